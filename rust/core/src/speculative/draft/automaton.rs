//! A suffix automaton over any number of growing sequences, with counted continuations.
//!
//! A state stands for the substrings that end at the same places; its longest has `len` tokens, and its link leads to
//! the longest suffix that also ends elsewhere. Blumer et al., "The smallest automaton recognizing the subwords of a
//! text", 1985; several sequences as in Mohri et al., "General suffix automaton construction algorithm", 2009.

/// A state of an automaton.
pub(super) type State = u32;

/// The state of the empty substring, at which every sequence begins.
pub(super) const ROOT: State = 0;

const NONE: u32 = u32::MAX;

/// Links followed to count a token: text has rarely more; a loop of one token would have as many as it is long.
const COUNTED: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Node {
    len: u32,
    link: State,
    /// Where the substrings ended first.
    first_end: u32,
    /// Where they ended so far; less for short suffixes in loops, see [`COUNTED`].
    count: u32,
    /// The edge that came first; the others hang behind it, the newest first.
    head: u32,
    /// The edge that was taken most often, the latest among equals.
    best: u32,
}

#[derive(Clone, Copy, Debug)]
struct Edge {
    token: u32,
    target: State,
    next: u32,
}

/// A continuation of a state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Next {
    pub(super) token: u32,
    pub(super) state: State,
    /// How often it was seen.
    pub(super) count: u32,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Automaton {
    nodes: Vec<Node>,
    edges: Vec<Edge>,
    /// Open addressing over (state, token): the edges that are not the first of their state, with their states.
    table: Vec<(State, u32)>,
    tabled: usize,
    tokens: usize,
}

/// Grows by a quarter: doubling would leave half of the memory unused.
fn push<T>(list: &mut Vec<T>, value: T) -> u32 {
    if list.len() == list.capacity() {
        list.reserve_exact((list.len() / 4).max(16));
    }
    list.push(value);
    (list.len() - 1) as u32
}

impl Default for Automaton {
    fn default() -> Automaton {
        let root = Node { len: 0, link: NONE, first_end: 0, count: 0, head: NONE, best: NONE };
        Automaton { nodes: vec![root], edges: Vec::new(), table: vec![(0, NONE); 16], tabled: 0, tokens: 0 }
    }
}

impl Automaton {
    /// Tokens taken in.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
            + self.edges.capacity() * size_of::<Edge>()
            + self.table.capacity() * size_of::<(State, u32)>()
    }

    /// Length of the longest substring of a state.
    pub(super) fn len(&self, state: State) -> usize {
        self.nodes[state as usize].len as usize
    }

    /// The state of the longest suffix that also ends elsewhere; none for the root.
    pub(super) fn link(&self, state: State) -> Option<State> {
        let link = self.nodes[state as usize].link;
        (link != NONE).then_some(link)
    }

    /// Where the state's substrings ended first.
    pub(super) fn first_end(&self, state: State) -> usize {
        self.nodes[state as usize].first_end as usize
    }

    /// How often they were seen.
    pub(super) fn count(&self, state: State) -> u32 {
        self.nodes[state as usize].count
    }

    /// The state behind `state` and `token`.
    pub(super) fn step(&self, state: State, token: u32) -> Option<State> {
        self.find(state, token).map(|edge| self.edges[edge as usize].target)
    }

    /// The longest suffix of `length` tokens of `state` and `token` that was seen: its state and length.
    pub(super) fn follow(&self, mut state: State, mut length: usize, token: u32) -> (State, usize) {
        loop {
            if let Some(next) = self.step(state, token) {
                return (next, length + 1);
            }
            let Some(link) = self.link(state) else { return (ROOT, 0) };
            (state, length) = (link, self.len(link));
        }
    }

    /// The state of the same substring after others were added: a split moves the shorter ones.
    pub(super) fn settle(&self, mut state: State, length: usize) -> State {
        while let Some(link) = self.link(state)
            && self.len(link) >= length
        {
            state = link;
        }
        state
    }

    /// The continuation seen most often, the latest among equals.
    pub(super) fn best(&self, state: State) -> Option<Next> {
        let best = self.nodes[state as usize].best;
        (best != NONE).then(|| self.next(best))
    }

    /// All continuations: the first, then the newest first.
    pub(super) fn continuations(&self, state: State) -> impl Iterator<Item = Next> {
        let mut edge = self.nodes[state as usize].head;
        std::iter::from_fn(move || {
            if edge == NONE {
                return None;
            }
            let next = self.next(edge);
            edge = self.edges[edge as usize].next;
            Some(next)
        })
    }

    fn next(&self, edge: u32) -> Next {
        let Edge { token, target, .. } = self.edges[edge as usize];
        Next { token, state: target, count: self.nodes[target as usize].count }
    }

    /// Adds `token` behind the sequence that has reached `last`; `end` is its place, for [`Automaton::first_end`].
    /// Returns the state it has reached now.
    pub(super) fn push(&mut self, last: State, token: u32, end: usize) -> State {
        self.tokens += 1;
        let reached = match self.find(last, token) {
            // Another sequence went here before.
            Some(edge) => self.suffix_state(last, token, self.edges[edge as usize].target),
            None => self.extend(last, token, end as u32),
        };
        self.count_token(last, token);
        reached
    }

    fn extend(&mut self, last: State, token: u32, end: u32) -> State {
        let len = self.nodes[last as usize].len + 1;
        let node = Node { len, link: ROOT, first_end: end, count: 0, head: NONE, best: NONE };
        let new = push(&mut self.nodes, node);
        let mut before = last;
        loop {
            self.add_edge(before, token, new);
            let Some(link) = self.link(before) else { return new };
            before = link;
            if let Some(edge) = self.find(before, token) {
                let target = self.edges[edge as usize].target;
                self.nodes[new as usize].link = self.suffix_state(before, token, target);
                return new;
            }
        }
    }

    /// The state whose longest substring is that of `before` and `token`, which leads to `target`; split off if need be.
    fn suffix_state(&mut self, before: State, token: u32, target: State) -> State {
        let len = self.nodes[before as usize].len + 1;
        if self.nodes[target as usize].len == len {
            return target;
        }
        let old = self.nodes[target as usize];
        let split = push(&mut self.nodes, Node { len, head: NONE, best: NONE, ..old });
        let mut edge = old.head;
        // The order of a list is kept, but for its first: the newest but one comes last in.
        let mut copied = Vec::new();
        while edge != NONE {
            copied.push(edge);
            edge = self.edges[edge as usize].next;
        }
        for &edge in copied[..1.min(copied.len())].iter().chain(copied[1.min(copied.len())..].iter().rev()) {
            let Edge { token, target, .. } = self.edges[edge as usize];
            let copy = self.add_edge(split, token, target);
            if edge == old.best {
                self.nodes[split as usize].best = copy;
            }
        }
        self.nodes[target as usize].link = split;
        let mut from = Some(before);
        while let Some(state) = from
            && let Some(edge) = self.find(state, token)
            && self.edges[edge as usize].target == target
        {
            self.edges[edge as usize].target = split;
            from = self.link(state);
        }
        split
    }

    /// Counts `token` behind each suffix of `last`.
    fn count_token(&mut self, last: State, token: u32) {
        let (mut state, mut counted) = (last, NONE);
        for _ in 0..COUNTED {
            let Some(edge) = self.find(state, token) else { return };
            let target = self.edges[edge as usize].target;
            if target != counted {
                self.nodes[target as usize].count = self.nodes[target as usize].count.saturating_add(1);
                counted = target;
            }
            let best = self.nodes[state as usize].best;
            if edge != best && self.nodes[target as usize].count >= self.next(best).count {
                self.nodes[state as usize].best = edge;
            }
            let Some(link) = self.link(state) else { return };
            state = link;
        }
    }

    fn find(&self, state: State, token: u32) -> Option<u32> {
        let Node { head, best, .. } = self.nodes[state as usize];
        if head == NONE {
            return None;
        }
        let first = self.edges[head as usize];
        if first.token == token {
            return Some(head);
        }
        if first.next == NONE {
            return None;
        }
        if self.edges[best as usize].token == token {
            return Some(best);
        }
        let mut slot = self.slot(state, token);
        loop {
            let (of, edge) = self.table[slot];
            if edge == NONE {
                return None;
            }
            if of == state && self.edges[edge as usize].token == token {
                return Some(edge);
            }
            slot = (slot + 1) & (self.table.len() - 1);
        }
    }

    fn slot(&self, state: State, token: u32) -> usize {
        let key = (u64::from(state) << 32 | u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((key ^ key >> 32) as usize) & (self.table.len() - 1)
    }

    fn add_edge(&mut self, state: State, token: u32, target: State) -> u32 {
        let Node { head, .. } = self.nodes[state as usize];
        if head == NONE {
            let edge = push(&mut self.edges, Edge { token, target, next: NONE });
            let node = &mut self.nodes[state as usize];
            (node.head, node.best) = (edge, edge);
            return edge;
        }
        let next = self.edges[head as usize].next;
        let edge = push(&mut self.edges, Edge { token, target, next });
        self.edges[head as usize].next = edge;
        self.tabled += 1;
        if self.tabled * 8 > self.table.len() * 7 {
            let larger = vec![(0, NONE); self.table.len() * 2];
            for (state, edge) in std::mem::replace(&mut self.table, larger) {
                if edge != NONE {
                    self.put(state, edge);
                }
            }
        }
        self.put(state, edge);
        edge
    }

    fn put(&mut self, state: State, edge: u32) {
        let mut slot = self.slot(state, self.edges[edge as usize].token);
        while self.table[slot].1 != NONE {
            slot = (slot + 1) & (self.table.len() - 1);
        }
        self.table[slot] = (state, edge);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The state of a substring.
    fn walk(automaton: &Automaton, tokens: &[u32]) -> Option<State> {
        tokens.iter().try_fold(ROOT, |state, &token| automaton.step(state, token))
    }

    fn occurrences(texts: &[Vec<u32>], part: &[u32]) -> usize {
        texts.iter().map(|text| text.windows(part.len()).filter(|window| *window == part).count()).sum()
    }

    proptest! {
        #[test]
        fn substrings_and_their_counts(texts in prop::collection::vec(prop::collection::vec(0u32..3, 0..12), 1..4)) {
            let mut automaton = Automaton::default();
            // All grow at once, as the answers of a batch do.
            let mut reached = vec![ROOT; texts.len()];
            for place in 0..12 {
                for (last, text) in reached.iter_mut().zip(&texts) {
                    if let Some(&token) = text.get(place) {
                        *last = automaton.push(*last, token, place);
                    }
                }
            }
            for length in 1..5 {
                for code in 0..3usize.pow(length as u32) {
                    let part: Vec<u32> = (0..length).map(|i| (code / 3usize.pow(i as u32) % 3) as u32).collect();
                    let state = walk(&automaton, &part);
                    let expected = occurrences(&texts, &part);
                    prop_assert_eq!(state.map_or(0, |state| automaton.count(state) as usize), expected);
                    let Some(state) = state else { continue };
                    prop_assert_eq!(automaton.settle(state, length), state);
                    // Among the continuations the best is as frequent as any.
                    let most = (0..3).map(|token| occurrences(&texts, &[&part[..], &[token]].concat())).max();
                    let best = automaton.best(state);
                    prop_assert_eq!(best.map_or(0, |next| next.count as usize), most.unwrap_or(0));
                    let mut tokens: Vec<u32> = automaton.continuations(state).map(|next| next.token).collect();
                    tokens.sort_unstable();
                    let expected: Vec<u32> =
                        (0..3).filter(|token| occurrences(&texts, &[&part[..], &[*token]].concat()) > 0).collect();
                    prop_assert_eq!(tokens, expected);
                }
            }
            for (last, text) in reached.iter().zip(&texts) {
                prop_assert_eq!(walk(&automaton, text), Some(*last));
            }
        }

        #[test]
        fn the_link_is_the_longest_repeated_suffix(text in prop::collection::vec(0u32..4, 1..60)) {
            let mut automaton = Automaton::default();
            let mut last = ROOT;
            for (end, &token) in text.iter().enumerate() {
                last = automaton.push(last, token, end);
                let seen = &text[..=end];
                let longest = (0..seen.len())
                    .rev()
                    .find(|&length| (0..end + 1 - length).any(|at| seen[at..at + length] == seen[end + 1 - length..]))
                    .unwrap_or(0);
                let link = automaton.link(last).unwrap();
                prop_assert_eq!(automaton.len(link), longest);
                if longest > 0 {
                    let first = (0..=end).find(|&at| seen[at..at + longest] == seen[end + 1 - longest..]).unwrap();
                    prop_assert_eq!(automaton.first_end(link), first + longest - 1);
                }
            }
        }
    }

    #[test]
    fn a_loop_costs_no_more_than_text() {
        let mut automaton = Automaton::default();
        let mut last = ROOT;
        for end in 0..100_000 {
            last = automaton.push(last, 7, end);
        }
        assert_eq!(automaton.len(last), 100_000);
        assert!(automaton.bytes() < 60 * automaton.tokens());
    }
}
