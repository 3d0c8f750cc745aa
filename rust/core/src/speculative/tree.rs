//! A tree of drafted tokens: what could follow the last committed one.

/// Most nodes of a tree, so that the ancestors of a node and the root fit 64 bits.
pub const MOST_NODES: usize = 63;

/// One drafted token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// Its id.
    pub token: u32,
    /// Index of the node before it; `None` follows the last committed token.
    pub parent: Option<u8>,
    /// Tokens behind the last committed one: 1 without a parent.
    pub depth: u8,
    /// Index of the drafter that proposed it.
    pub drafter: u8,
    /// The drafter's class of confidence: the controller learns how often nodes of a class are right, given that their
    /// parent was.
    pub class: u8,
    /// The drafter's own estimate in (0, 1] of how likely the node is, given its parent, beside others of its class; 1
    /// when it has none.
    pub ratio: f32,
}

/// Drafted tokens, parents before children; children of one node in the order in which they were proposed.
///
/// ```
/// use farthing::speculative::tree::DraftTree;
/// let mut tree = DraftTree::default();
/// let first = tree.push(None, 7, 0, 1.0).unwrap();
/// tree.push(Some(first), 8, 0, 1.0);
/// tree.push(None, 9, 0, 0.5);
/// assert_eq!(tree.ancestors(), [0b11, 0b111, 0b1001]);
/// assert_eq!(tree.child(None, 9), Some(2));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DraftTree {
    nodes: Vec<Node>,
    /// Stamped on the nodes that are pushed.
    drafter: u8,
}

impl DraftTree {
    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing is drafted.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Removes all nodes.
    pub fn clear(&mut self) {
        self.nodes.clear();
    }

    /// Says whose the nodes are that are pushed from now on.
    pub fn set_drafter(&mut self, drafter: u8) {
        self.drafter = drafter;
    }

    /// Says whose the nodes from index `from` on are, whatever they were pushed as.
    pub fn claim(&mut self, from: usize, drafter: u8) {
        self.nodes.iter_mut().skip(from).for_each(|node| node.drafter = drafter);
    }

    /// Adds a token behind `parent`; its index, or that of the child that already says the same. `None` when the tree is
    /// full.
    ///
    /// # Panics
    /// When there is no such parent.
    pub fn push(&mut self, parent: Option<u8>, token: u32, class: u8, ratio: f32) -> Option<u8> {
        let depth = parent.map_or(1, |parent| self.nodes[parent as usize].depth + 1);
        if let Some(same) = self.child(parent, token) {
            return Some(same);
        }
        if self.nodes.len() == MOST_NODES {
            return None;
        }
        self.nodes.push(Node { token, parent, depth, drafter: self.drafter, class, ratio });
        Some((self.nodes.len() - 1) as u8)
    }

    /// Adds a chain behind the last committed token.
    pub fn push_chain(&mut self, tokens: impl IntoIterator<Item = u32>, class: impl Fn(usize) -> u8) {
        let mut parent = None;
        for (index, token) in tokens.into_iter().enumerate() {
            parent = self.push(parent, token, class(index), 1.0);
            if parent.is_none() {
                return;
            }
        }
    }

    /// The child of `parent` that is `token`.
    pub fn child(&self, parent: Option<u8>, token: u32) -> Option<u8> {
        let found = self.nodes.iter().position(|node| node.parent == parent && node.token == token);
        found.map(|index| index as u8)
    }

    /// Whether each node has one child at most, so that rows behind each other see all before them.
    pub fn is_chain(&self) -> bool {
        self.nodes.iter().enumerate().all(|(index, node)| node.parent.map_or(0, |parent| parent as usize + 1) == index)
    }

    /// For each node the rows that it sees: bit 0 is the last committed token, bit `i + 1` node `i`, its own included.
    pub fn ancestors(&self) -> Vec<u64> {
        let mut masks: Vec<u64> = Vec::with_capacity(self.nodes.len());
        for (index, node) in self.nodes.iter().enumerate() {
            let before = node.parent.map_or(1, |parent| masks[parent as usize]);
            masks.push(before | 1 << (index + 1));
        }
        masks
    }

    /// Keeps the nodes for which `keep` says so; descendants of dropped nodes go with them.
    pub fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        let mut places: Vec<Option<u8>> = Vec::with_capacity(self.nodes.len());
        let mut kept = Vec::with_capacity(self.nodes.len());
        for (index, node) in self.nodes.iter().enumerate() {
            let parent = node.parent.map(|parent| places[parent as usize]);
            let place = if keep(index) && parent != Some(None) {
                kept.push(Node { parent: parent.flatten(), ..*node });
                Some((kept.len() - 1) as u8)
            } else {
                None
            };
            places.push(place);
        }
        self.nodes = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_tree_takes_no_more() {
        let mut tree = DraftTree::default();
        tree.push_chain(0..100, |_| 0);
        assert_eq!((tree.len(), tree.is_chain()), (MOST_NODES, true));
        assert_eq!(tree.ancestors()[62], u64::MAX);
        assert_eq!(tree.push(None, 5, 0, 1.0), None);
        assert_eq!(tree.push(None, 0, 0, 1.0), Some(0));
    }

    #[test]
    fn descendants_go_with_a_dropped_node() {
        let mut tree = DraftTree::default();
        let first = tree.push(None, 1, 0, 1.0);
        let second = tree.push(None, 2, 0, 1.0);
        tree.push(first, 3, 0, 1.0);
        tree.push(second, 4, 0, 1.0);
        assert!(!tree.is_chain());
        tree.retain(|index| index != 0);
        let left: Vec<_> = tree.nodes().iter().map(|node| (node.token, node.parent, node.depth)).collect();
        assert_eq!(left, [(2, None, 1), (4, Some(0), 2)]);
    }
}
