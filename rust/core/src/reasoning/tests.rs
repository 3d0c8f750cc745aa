//! The controller beside slow restatements: brute force over the whole text, llama.cpp's and vLLM's rules.

use super::*;
use proptest::prelude::*;
use std::sync::Arc;

const NEVER: usize = 1 << 30;

fn spec(start: &[u32], end: &[u32], close: &[u32]) -> Arc<ThinkSpec> {
    let markers = [(Role::Start, start.to_vec()), (Role::End, end.to_vec())];
    let spec = ThinkSpec::of_ids(Arc::new(Lexicon::default()), &markers, close.to_vec(), vec![99], false);
    Arc::new(spec.unwrap())
}

/// What brute force knows of a text: whether it is thinking, and which of its tokens are.
#[derive(Debug, Default, PartialEq)]
struct Known {
    thinking: bool,
    opened: bool,
    tokens: usize,
}

/// Looks for the markers in all of `tokens` behind the last one found, from token `from` on as generated.
fn brute(tokens: &[u32], from: usize, start: &[u32], end: &[u32]) -> Known {
    let mut known = Known::default();
    let mut behind = 0;
    let mut inside = vec![false; tokens.len()];
    for at in 0..tokens.len() {
        let ends_with = |marker: &[u32]| at + 1 >= behind + marker.len() && tokens[..=at].ends_with(marker);
        inside[at] = known.thinking;
        // In the prompt the last marker decides, so a second start counts.
        if ends_with(start) && (!known.thinking || at < from) {
            // Tokens before it were thinking of an earlier span, or never generated.
            (known.thinking, known.opened, behind) = (true, true, at + 1);
        } else if known.thinking && ends_with(end) || at < from && ends_with(end) {
            (known.thinking, behind) = (false, at + 1);
            inside[at + 1 - end.len()..=at].fill(false);
        }
    }
    known.tokens = inside[from..].iter().filter(|&&inside| inside).count();
    known
}

fn follow(spec: &Arc<ThinkSpec>, prompt: &[u32], tokens: &[u32]) -> Controller {
    let mut controller = Controller::new(Arc::clone(spec), None, prompt, NEVER).unwrap();
    for &token in tokens {
        controller.push(token);
    }
    controller
}

/// Goes on with `drawn` wherever nothing is dictated; the text and where it was dictated.
fn obey(controller: &mut Controller, drawn: &[u32], length: usize) -> (Vec<u32>, Vec<bool>) {
    let mut drawn = drawn.iter().copied();
    let (mut tokens, mut dictated) = (Vec::new(), Vec::new());
    while tokens.len() < length {
        let forced = controller.forced();
        let Some(token) = forced.or_else(|| drawn.next()) else { break };
        controller.push(token);
        tokens.push(token);
        dictated.push(forced.is_some());
    }
    (tokens, dictated)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn spans_are_those_of_brute_force(
        start in prop::collection::vec(0u32..3, 1..5),
        end in prop::collection::vec(0u32..3, 1..5),
        prompt in prop::collection::vec(0u32..4, 0..20),
        tokens in prop::collection::vec(0u32..4, 0..60),
    ) {
        prop_assume!(start != end && !start.ends_with(&end) && !end.ends_with(&start));
        let spec = spec(&start, &end, &end);
        let controller = follow(&spec, &prompt, &tokens);
        // In the prompt all cursors move together; a marker cut by its end begins with the role that may follow.
        let whole = [prompt.clone(), tokens.clone()].concat();
        let straddles = |marker: &[u32]| (1..marker.len()).any(|cut| {
            prompt.ends_with(&marker[..cut]) && tokens.starts_with(&marker[cut..])
        });
        let known = brute(&whole, prompt.len(), &start, &end);
        prop_assume!(!straddles(&end) || known == brute(&whole, prompt.len(), &start, &end));
        let found = Known {
            thinking: controller.is_thinking(),
            opened: controller.opened() || known.opened,
            tokens: controller.thinking_tokens(),
        };
        prop_assert_eq!(found, known);
        prop_assert_eq!(controller.forced_tokens() + controller.thinking_tokens() + controller.answer_tokens(), tokens.len());
    }

    #[test]
    fn a_hard_budget_is_never_exceeded_and_the_answer_keeps_its_reserve(
        budget in 0u32..12,
        close in prop::collection::vec(3u32..9, 0..5),
        end in prop::collection::vec(10u32..12, 1..4),
        reserve in 0u32..10,
        spare in 0usize..40,
        drawn in prop::collection::vec(prop::sample::select(vec![1u32, 5, 6, 7, 10, 11]), 100),
        opened in any::<bool>(),
    ) {
        let close = [close, end.clone()].concat();
        let spec = spec(&[1], &end, &close);
        let policy = Policy { answer_reserve: Some(reserve), ..Policy::hard(budget) };
        let most = close.len() + reserve as usize + spare;
        let prompt: &[u32] = if opened { &[1] } else { &[2] };
        let mut controller = Controller::new(spec, Some(&policy), prompt, most).unwrap();
        let mut drawn = drawn.into_iter();
        let mut closed_at = None;
        for made in 0..most {
            let thinking = controller.is_thinking() || controller.forced().is_some();
            let token = controller.forced().or_else(|| drawn.next()).unwrap();
            controller.push(token);
            prop_assert!(controller.thinking_tokens() <= budget as usize);
            if thinking && !controller.is_thinking() && controller.forced().is_none() {
                closed_at = Some(made + 1);
                // A span that opens when nothing is left for it takes from the answer what its end needs.
                if opened && controller.opened() && drawn.len() == 0 {
                    break;
                }
            }
        }
        if opened && let Some(closed) = closed_at && !drawn.as_slice().is_empty() && controller.forced_tokens() <= close.len() {
            prop_assert!(most - closed.min(most) >= reserve as usize || controller.answer_tokens() >= reserve as usize);
        }
    }

    #[test]
    fn forced_positions_are_those_of_vllm_and_of_llama_cpp(
        budget in 0u32..12,
        prompt in prop::collection::vec(prop::sample::select(vec![1u32, 5, 6, 10]), 0..6),
        drawn in prop::collection::vec(prop::sample::select(vec![5u32, 6, 7, 8, 9]), 60),
        start in 0usize..30,
        natural in prop::option::of(0usize..40),
    ) {
        let mut drawn = drawn;
        drawn[start] = 1;
        if let Some(at) = natural {
            drawn[at] = 10;
        }
        // One span: what becomes of a second one is a choice of each.
        let first = drawn.iter().position(|&token| token == 10).map_or(drawn.len(), |at| at + 1);
        for token in &mut drawn[first..] {
            *token = if *token == 1 { 5 } else { *token };
        }
        let whole = drawn.clone();
        if prompt.contains(&1) {
            drawn[start] = if drawn[start] == 1 { 5 } else { drawn[start] };
        }
        let spec = spec(&[1], &[10], &[30, 31, 10, 32]);
        let policy = Policy { answer_reserve: Some(0), reentry: Reentry::Rearm, ..Policy::hard(budget) };
        let mut ours = Controller::new(Arc::clone(&spec), Some(&policy), &prompt, NEVER).unwrap();
        let (tokens, dictated) = obey(&mut ours, &drawn, 50);
        prop_assert_eq!(vllm(&prompt, &drawn, budget as usize, spec.forced_close(), tokens.len()), (tokens, dictated));

        // llama.cpp counts generated tokens only, and waits for whole characters: 9 is half of one.
        let all: BitSet = (0..40).collect();
        let lexicon = Lexicon::unspelled(all, BitSet::from_iter([9]));
        let markers = [(Role::Start, vec![1]), (Role::End, vec![10])];
        let close = spec.forced_close().to_vec();
        let spec = Arc::new(ThinkSpec::of_ids(Arc::new(lexicon), &markers, close, vec![], false).unwrap());
        let waiting = Policy { budget: Some(budget), cap: None, grace: Some(1000), ..policy };
        let mut ours = Controller::new(Arc::clone(&spec), Some(&waiting), &[], NEVER).unwrap();
        let (tokens, dictated) = obey(&mut ours, &whole, 50);
        prop_assert_eq!(llama_cpp(&whole, budget, spec.forced_close(), tokens.len()), (tokens, dictated));
    }

    #[test]
    fn peek_is_what_pushing_would_say(
        budget in 0u32..6,
        tokens in prop::collection::vec(prop::sample::select(vec![1u32, 5, 10, 99]), 0..12),
        drafts in prop::collection::vec(prop::sample::select(vec![1u32, 5, 10, 30, 99]), 0..12),
        ban in any::<bool>(),
    ) {
        let spec = spec(&[1], &[10], &[30, 10]);
        let ban = if ban { vec![5] } else { Vec::new() };
        let policy = Policy { ban, reentry: Reentry::Ban, ..Policy::hard(budget) };
        let mut controller = Controller::new(spec, Some(&policy), &[], NEVER).unwrap();
        obey(&mut controller, &tokens, 20);
        let before = format!("{controller:?}");
        let stands = controller.peek(&drafts);
        prop_assert_eq!(format!("{controller:?}"), before);
        for &draft in &drafts[..stands] {
            prop_assert!(controller.forced().is_none_or(|forced| forced == draft));
            let mut row = vec![0.0f32; 128];
            controller.process(&mut row);
            prop_assert!(row[draft as usize] > f32::NEG_INFINITY);
            controller.push(draft);
        }
        if let Some(&draft) = drafts.get(stands) {
            let mut row = vec![0.0f32; 128];
            controller.process(&mut row);
            prop_assert_eq!(row[draft as usize], f32::NEG_INFINITY);
        }
    }

    #[test]
    fn a_loop_is_caught_when_brute_force_sees_it(
        head in prop::collection::vec(0u32..4, 0..40),
        period in prop::collection::vec(0u32..4, 1..140),
        times in 1usize..30,
    ) {
        let mut tokens = head;
        for _ in 0..times {
            tokens.extend(&period);
        }
        let mut guard = LoopGuard::default();
        let caught = tokens.iter().position(|&token| guard.push(token));
        let repeats = |end: usize, period: usize| {
            let needed = period * if period < 8 { 24 } else { 8 };
            end >= needed && (end - needed + period..end).all(|at| tokens[at] == tokens[at - period])
        };
        let brute = (0..tokens.len()).find(|&last| (1..=128).any(|period| repeats(last + 1, period)));
        prop_assert_eq!(caught, brute);
    }

    #[test]
    fn tags_are_found_however_tokens_cut_them(tokens in prop::collection::vec(0u32..TEXTS.len() as u32, 0..60)) {
        let spec = text_spec(Some("<think>"));
        let controller = follow(&spec, &[], &tokens);
        let text: String = tokens.iter().map(|&token| TEXTS[token as usize]).collect();
        // Spans in the text, then tokens whose first byte lies in one.
        let (mut spans, mut from) = (Vec::new(), 0);
        while let Some(start) = text[from..].find("<think>").map(|at| from + at + 7) {
            // An end in the token of its start is text.
            let token_end = token_ends(&tokens).into_iter().find(|&end| end >= start).unwrap();
            let mut search = start;
            let end = loop {
                let Some(end) = text[search..].find("</think>").map(|at| search + at) else { break text.len() };
                if end + 8 > token_end {
                    break end;
                }
                search = end + 1;
            };
            spans.push((start, end));
            from = token_ends(&tokens).into_iter().find(|&place| place >= (end + 8).min(text.len())).unwrap_or(text.len());
            if end == text.len() {
                break;
            }
        }
        let ends = token_ends(&tokens);
        let begins = std::iter::once(0).chain(ends.iter().copied());
        let inside = |begin: usize| spans.iter().any(|&(start, end)| begin >= start && begin < end);
        let count = begins.take(tokens.len()).filter(|&begin| inside(begin)).count();
        prop_assert_eq!(controller.thinking_tokens(), count, "{}", text);
    }
}

fn token_ends(tokens: &[u32]) -> Vec<usize> {
    let lengths = tokens.iter().map(|&token| TEXTS[token as usize].len());
    lengths
        .scan(0, |sum, length| {
            Some({
                *sum += length;
                *sum
            })
        })
        .collect()
}

/// Pieces of tags, merged with each other and with what may stand beside them.
const TEXTS: [&str; 16] = [
    "<",
    "think",
    ">",
    "</",
    "think>",
    ">\n",
    "a<",
    "a</",
    "th",
    "ink",
    "<think",
    "</think>",
    "<think>",
    "a",
    ". ",
    "</think>\n\n",
];

fn text_spec(start: Option<&str>) -> Arc<ThinkSpec> {
    let lexicon = Arc::new(Lexicon::new(TEXTS.iter().map(|text| text.as_bytes())));
    // Greedy, longest first; never one token for a tag.
    let mut encode = |text: &str| {
        let (mut ids, mut rest) = (Vec::new(), text);
        while !rest.is_empty() {
            let fits = |&id: &usize| rest.starts_with(TEXTS[id]) && !TEXTS[id].contains("think>");
            let Some(id) = (0..TEXTS.len()).filter(fits).max_by_key(|&id| TEXTS[id].len()) else {
                rest = &rest[1..];
                continue;
            };
            rest = &rest[TEXTS[id].len()..];
            ids.push(id as u32);
        }
        Ok(ids)
    };
    let wishes = Wishes {
        start: start.map(str::to_owned),
        end: "</think>".to_owned(),
        close: "</think>".to_owned(),
        header: None,
        message: ". ".to_owned(),
        probe: "</think>".to_owned(),
    };
    Arc::new(ThinkSpec::build(lexicon, &wishes, &[], &mut encode).unwrap())
}

/// vLLM V1's rule: count what follows the last start; where the budget is reached, the end sequence comes token by token.
fn vllm(prompt: &[u32], drawn: &[u32], budget: usize, close: &[u32], length: usize) -> (Vec<u32>, Vec<bool>) {
    let mut all = prompt.to_vec();
    let (mut tokens, mut dictated, mut drawn) = (Vec::new(), Vec::new(), drawn.iter().copied());
    let mut ending: Option<usize> = None;
    let mut started: Option<usize> = None;
    while tokens.len() < length {
        // The whole text, each time anew.
        let last =
            |marker: u32, from: usize| all[from..].iter().rposition(|&token| token == marker).map(|at| from + at);
        let start = last(1, 0).filter(|&start| last(10, start).is_none());
        let start = start.map(|start| if start >= prompt.len() { started.unwrap_or(start) } else { start });
        if start.is_some() && ending.is_none() {
            started = start;
            ending = (all.len() - start.unwrap_or(0) > budget).then_some(0);
        }
        let forced = ending.and_then(|at| close.get(at).copied());
        let Some(token) = forced.or_else(|| drawn.next()) else { break };
        ending = ending.map(|at| at + 1);
        all.push(token);
        tokens.push(token);
        dictated.push(forced.is_some());
    }
    (tokens, dictated)
}

/// llama.cpp's reasoning budget: idle, counting, waiting for a whole character, forcing, done.
fn llama_cpp(drawn: &[u32], budget: u32, close: &[u32], length: usize) -> (Vec<u32>, Vec<bool>) {
    enum State {
        Idle,
        Counting(u32),
        Waiting,
        Forcing(usize),
        Done,
    }
    let (mut tokens, mut dictated, mut drawn) = (Vec::new(), Vec::new(), drawn.iter().copied());
    let mut state = State::Idle;
    while tokens.len() < length {
        let forced = if let State::Forcing(at) = state { Some(close[at]) } else { None };
        let Some(token) = forced.or_else(|| drawn.next()) else { break };
        tokens.push(token);
        dictated.push(forced.is_some());
        state = match state {
            State::Idle if token == 1 && budget == 0 => State::Forcing(0),
            State::Idle if token == 1 => State::Counting(budget),
            State::Idle => State::Idle,
            State::Counting(_) | State::Waiting if token == 10 => State::Done,
            State::Counting(1) | State::Waiting => {
                if token == 9 {
                    State::Waiting
                } else {
                    State::Forcing(0)
                }
            }
            State::Counting(left) => State::Counting(left - 1),
            State::Forcing(at) if at + 1 == close.len() => State::Done,
            State::Forcing(at) => State::Forcing(at + 1),
            State::Done => State::Done,
        };
    }
    (tokens, dictated)
}

#[test]
fn a_begun_tag_is_completed_by_force() {
    let spec = text_spec(Some("<think>"));
    // "<think>" "a" "a</" with a budget of two: the end goes on where the model began it.
    let mut controller = Controller::new(spec, Some(&Policy::hard(2)), &[12], NEVER).unwrap();
    assert_eq!(controller.push(13), None);
    assert_eq!(controller.push(7), None);
    assert_eq!(controller.dictated_tokens(), [1, 2]);
    controller.push(1);
    assert_eq!(controller.push(2), Some(Change { role: Role::End, tokens: 3, lead: 1, tail: 0 }));
    assert_eq!((controller.thinking_tokens(), controller.forced_tokens(), controller.answer_tokens()), (2, 2, 0));
    assert_eq!(controller.stop(), Some(Stop::Budget));
}

#[test]
fn text_in_a_marker_is_told_from_text_beside_it() {
    let spec = text_spec(Some("<think>"));
    let mut controller = Controller::new(spec, None, &[12], NEVER).unwrap();
    controller.push(7);
    assert_eq!(controller.pending(), 1);
    controller.push(1);
    let change = controller.push(5);
    assert_eq!(change, Some(Change { role: Role::End, tokens: 3, lead: 1, tail: 1 }));
    assert_eq!((controller.thinking_tokens(), controller.answer_tokens()), (1, 2));
}

#[test]
fn a_whole_answer_can_be_the_span() {
    let spec = text_spec(None);
    let policy = Policy { answer_reserve: Some(3), ..Policy::hard(4) };
    let mut controller = Controller::new(Arc::clone(&spec), Some(&policy), &[12, 11], 100).unwrap();
    assert_eq!(controller.phase(), Phase::Think);
    let (tokens, dictated) = obey(&mut controller, &[13; 20], 10);
    assert_eq!(dictated.iter().position(|&dictated| dictated), Some(4));
    let text: String = tokens.iter().map(|&token| TEXTS[token as usize]).collect();
    assert!(text.starts_with("aaaa. </think>aa"), "{text}");
    assert_eq!(controller.phase(), Phase::Answer);
}

#[test]
fn prompts_leave_the_sequence_where_their_last_marker_does() {
    let spec = text_spec(Some("<think>"));
    let phase = |prompt: &[u32]| Controller::new(Arc::clone(&spec), None, prompt, NEVER).unwrap().phase();
    assert_eq!(phase(&[13, 12]), Phase::Think);
    assert_eq!(phase(&[12, 15]), Phase::Answer);
    assert_eq!(phase(&[12, 11, 13]), Phase::Idle);
    assert_eq!(phase(&[13]), Phase::Idle);
    // A tag that the prompt begins and the answer ends.
    let mut controller = Controller::new(Arc::clone(&spec), None, &[13, 10], NEVER).unwrap();
    assert_eq!(controller.push(2).map(|change| change.role), Some(Role::Start));
    assert!(controller.is_thinking());
}

#[test]
fn the_end_of_the_answer_inside_thinking_ends_the_thinking() {
    let spec = spec(&[1], &[10], &[30, 10]);
    let policy = Policy { reentry: Reentry::Ban, min_think: 1, ..Policy::hard(50) };
    let mut controller = Controller::new(spec, Some(&policy), &[1], NEVER).unwrap();
    let mut row = vec![0.0f32; 128];
    controller.process(&mut row);
    assert!(row[99] == f32::NEG_INFINITY && row[10] == f32::NEG_INFINITY, "thinking is too short to end");
    controller.push(5);
    let mut row = vec![0.0f32; 128];
    row[99] = 7.0;
    controller.process(&mut row);
    assert_eq!((row[99], row[10]), (f32::NEG_INFINITY, 7.0));
    assert_eq!(controller.peek(&[5, 99]), 1);
    assert!(controller.redirect(99));
    assert_eq!(controller.dictated_tokens(), [30, 10]);
    controller.push(30);
    controller.push(10);
    assert_eq!((controller.phase(), controller.stop()), (Phase::Answer, Some(Stop::EosFix)));
    assert!(!controller.permits(1) && controller.permits(99), "no second span");
}

#[test]
fn the_ramp_rises_to_the_margin_at_the_budget() {
    let lexicon = Arc::new(Lexicon::unspelled(BitSet::from_iter([6]), BitSet::default()));
    let markers = [(Role::Start, vec![1]), (Role::End, vec![10])];
    let spec = Arc::new(ThinkSpec::of_ids(lexicon, &markers, vec![10], vec![], false).unwrap());
    let policy = Policy { budget: Some(10), soft_ratio: 0.5, ramp: Some(Ramp::Linear), ..Policy::default() };
    let mut controller = Controller::new(spec, Some(&policy), &[1], NEVER).unwrap();
    let raised = |controller: &Controller| {
        let mut row = vec![0.0f32; 16];
        (row[3], row[10]) = (8.25, -2.0);
        controller.process(&mut row);
        row[10]
    };
    let mut heights = Vec::new();
    for token in [5, 5, 5, 5, 5, 5, 6, 5, 6, 5] {
        heights.push(raised(&controller));
        controller.push(token);
    }
    // A quarter of the ramp inside a sentence, all of it behind one.
    assert_eq!(heights, [-2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -1.5, 2.0, -0.5, 6.0]);
    assert_eq!(controller.phase(), Phase::Grace);
    assert_eq!(raised(&controller), 0.5);
    controller.push(6);
    assert_eq!((controller.stop(), controller.forced()), (Some(Stop::Grace), Some(10)));
}

#[test]
fn circles_end_the_thinking() {
    let spec = spec(&[1], &[10], &[10]);
    let policy = Policy { budget: Some(10_000), ..Policy::default() };
    let mut controller = Controller::new(spec, Some(&policy), &[1], NEVER).unwrap();
    let (tokens, dictated) = obey(&mut controller, &[5, 6].repeat(100), 100);
    assert_eq!((dictated.iter().position(|&dictated| dictated), tokens[48]), (Some(48), 10));
    assert_eq!(controller.stop(), Some(Stop::Loop));
}

#[test]
fn known_pairs_are_found_in_vocabularies_and_templates() {
    let harmony = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>"];
    let end = |has: &[&str], template| ThinkSpec::detect(|token| has.contains(&token), template).map(|pair| pair.end);
    assert_eq!(end(&harmony, None), Some("<|end|>"));
    assert_eq!(end(&["[THINK]", "[/THINK]"], None), Some("[/THINK]"));
    assert_eq!(end(&["<|end|>"], None), None);
    assert_eq!(end(&[], Some("{{ '<think>' }}…</think>")), Some("</think>"));
}

#[test]
fn wrong_specifications_name_what_is_wrong() {
    let lexicon = || Arc::new(Lexicon::default());
    let build = |markers: &[(Role, Vec<u32>)], close: &[u32]| {
        ThinkSpec::of_ids(lexicon(), markers, close.to_vec(), vec![], false).unwrap_err().to_string()
    };
    assert!(build(&[(Role::Start, vec![1])], &[2]).starts_with("ends: got none"));
    assert!(build(&[(Role::End, vec![])], &[2]).starts_with("markers: got a marker of 0 tokens"));
    assert!(build(&[(Role::End, vec![2])], &[3]).starts_with("forced_close: got [3]"));
    let spec = spec(&[1], &[10], &[10]);
    let policy = Policy { ban: vec![10], ..Policy::default() };
    assert!(Controller::new(spec, Some(&policy), &[], 10).unwrap_err().to_string().starts_with("ban: got token 10"));
}

#[test]
fn looks_are_due_behind_paragraphs_or_every_so_many_tokens() {
    let lexicon = Arc::new(Lexicon::new([&b"a"[..], b"\n", b".\n\n", b"<", b">", b" "]));
    let markers = [(Role::Start, vec![3]), (Role::End, vec![4])];
    let spec = Arc::new(ThinkSpec::of_ids(lexicon, &markers, vec![4], vec![], false).unwrap());
    let due = |every, min_think| {
        let probe = Some(Probe { every, most: 3, ..Probe::default() });
        let policy = Policy { min_think, probe, ..Policy::default() };
        let mut controller = Controller::new(Arc::clone(&spec), Some(&policy), &[3], NEVER).unwrap();
        let mut due = Vec::new();
        for (index, token) in [1, 0, 2, 1, 0, 1, 5, 1, 0, 0, 2, 2, 4, 2].into_iter().enumerate() {
            controller.push(token);
            if controller.probe_due() {
                due.push(index);
                controller.probed();
                assert!(!controller.probe_due(), "one look at a place");
            }
        }
        due
    };
    assert_eq!(due(None, 0), [2, 7, 10]);
    assert_eq!(due(None, 6), [7, 10, 11]);
    assert_eq!(due(Some(4), 0), [3, 7, 11]);
}
