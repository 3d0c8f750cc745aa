//! Drafts of every kind of worth: the same bits as without them, and fewer passes when they are right.

use super::states::{lfm2, qwen35};
use super::*;
use farthing::speculative::draft::{Composed, Draft, Drafter, Observed, Target, TokenRecycling, Wants};
use std::collections::HashMap;

/// How a drafter of the tests goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Knows the answers, and drafts trees in which some branches and some tokens are wrong.
    Prophet,
    /// Any tokens, any shape.
    Dice,
    /// Ids beyond the vocabulary.
    Stranger,
    /// Fails at once, or when it is told of tokens.
    Fails,
    Deaf,
}

#[derive(Debug)]
struct Tester {
    kind: Kind,
    /// By prompt.
    answers: HashMap<Vec<u32>, Vec<u32>>,
    /// Of each request, as far as it was told.
    texts: HashMap<u64, Vec<u32>>,
    state: u64,
}

impl Tester {
    fn boxed(kind: Kind, answers: HashMap<Vec<u32>, Vec<u32>>) -> Box<dyn Drafter> {
        Box::new(Tester { kind, answers, texts: HashMap::new(), state: 1 })
    }

    fn dice(&mut self, sides: usize) -> usize {
        (f32::midpoint(noise(&mut self.state), 1.0) * sides as f32) as usize % sides
    }

    /// What follows `tokens`, if it is known.
    fn rest(&self, tokens: &[u32]) -> Vec<u32> {
        let known = |(prompt, answer): (&Vec<u32>, &Vec<u32>)| {
            let whole: Vec<u32> = prompt.iter().chain(answer).copied().collect();
            (whole.len() > tokens.len() && whole.starts_with(tokens)).then(|| whole[tokens.len()..].to_vec())
        };
        self.answers.iter().find_map(known).unwrap_or_default()
    }
}

impl Drafter for Tester {
    fn name(&self) -> &'static str {
        "tester"
    }

    fn wants(&self) -> Wants {
        Wants { top: 3, ..Wants::default() }
    }

    fn begin(&mut self, request: u64, prompt: &[u32]) -> Result<(), Error> {
        assert!(self.texts.insert(request, prompt.to_vec()).is_none(), "begun twice");
        Ok(())
    }

    fn draft(&mut self, _: &dyn Target, drafts: &mut [Draft<'_>]) -> Result<(), Error> {
        for draft in drafts {
            assert_eq!(self.texts[&draft.request], draft.tokens, "told of every token");
            assert_eq!(draft.sampling.position as usize, draft.tokens.len());
            let budget = draft.budget.min(20);
            match self.kind {
                Kind::Prophet => {
                    let mut parent = None;
                    for token in self.rest(draft.tokens) {
                        if draft.tree.len() + 2 > budget {
                            break;
                        }
                        // A wrong sibling before or behind, and now and then nothing but wrong.
                        let (before, behind, wrong) = (self.dice(3) == 0, self.dice(3) == 0, self.dice(8) == 0);
                        if before {
                            draft.tree.push(parent, (token + 1) % VOCAB as u32, 5, 0.5);
                        }
                        let next =
                            draft.tree.push(parent, if wrong { (token + 7) % VOCAB as u32 } else { token }, 5, 1.0);
                        if behind {
                            let side = draft.tree.push(parent, (token + 2) % VOCAB as u32, 5, 0.5);
                            draft.tree.push(side, token, 5, 0.5);
                        }
                        parent = next;
                    }
                }
                Kind::Dice => {
                    while draft.tree.len() < budget {
                        let parent = self.dice(draft.tree.len() + 1).checked_sub(1).map(|parent| parent as u8);
                        draft.tree.push(parent, self.dice(VOCAB) as u32, self.state as u8, 1.0);
                    }
                }
                Kind::Stranger => draft.tree.push_chain([1 << 30, 3], |_| 0),
                Kind::Fails => return Err(Error::argument("draft", "this", "something else")),
                Kind::Deaf => draft.tree.push_chain([1, 2, 3], |_| 0),
            }
        }
        Ok(())
    }

    fn observe(&mut self, observed: &Observed<'_>) -> Result<(), Error> {
        if self.kind == Kind::Deaf {
            return Err(Error::argument("observe", "this", "silence"));
        }
        let text = self.texts.get_mut(&observed.request).unwrap();
        assert_eq!(observed.rows.first(), text.last(), "the last token's row comes first");
        assert_eq!(observed.top.len(), 3 * observed.rows.len());
        text.extend_from_slice(observed.tokens);
        Ok(())
    }

    fn end(&mut self, request: u64) {
        assert!(self.texts.remove(&request).is_some(), "ended twice");
    }
}

/// The longer requests, whose tokens draw penalties, noise and log-probabilities.
fn requests() -> Vec<Request> {
    (0..6).map(request).collect()
}

fn answers(expected: &[Completion]) -> HashMap<Vec<u32>, Vec<u32>> {
    expected.iter().enumerate().map(|(index, completion)| (prompt(index), completion.token_ids.clone())).collect()
}

fn speculating(
    directory: &Directory,
    options: &Options,
    kind: Kind,
    fixed: Option<usize>,
    truth: &[Completion],
) -> Llm {
    let speculation = Speculation { drafters: vec![Tester::boxed(kind, answers(truth))], draft_tokens: fixed };
    Llm::load(&directory.0, options, speculation, &|_| ()).unwrap()
}

#[test]
fn drafts_change_no_bit() {
    for directory in [checkpoint("drafts", 512), lfm2("drafts-lfm2"), qwen35("drafts-qwen35")] {
        let plain = load(&directory, &options());
        let expected: Vec<Completion> =
            requests().into_iter().map(|request| plain.generate(vec![request]).unwrap().remove(0)).collect();
        let variants = [
            options(),
            Options { threads: Some(2), chunk: Some(7), ..options() },
            // Pages run out, so that drafts go without and sequences are computed anew.
            Options { kv_pages: Some(5), ..options() },
        ];
        for (kind, fixed) in
            [(Kind::Prophet, Some(20)), (Kind::Prophet, None), (Kind::Dice, Some(9)), (Kind::Dice, None)]
        {
            for variant in &variants {
                let llm = speculating(&directory, variant, kind, fixed, &expected);
                let together = llm.generate(requests()).unwrap();
                for (index, (got, expected)) in together.iter().zip(&expected).enumerate() {
                    assert_eq!(bits(got), bits(expected), "request {index}, {kind:?} {fixed:?} under {variant:?}");
                    assert_eq!(got.finish_reason, expected.finish_reason);
                    assert!(got.ledger.accepted <= got.ledger.drafted);
                }
                let alone = llm.generate(vec![request(5)]).unwrap().remove(0);
                assert_eq!(bits(&alone), bits(&expected[5]));
                let ledger = llm.ledger();
                assert_eq!(llm.take_warnings(), [""; 0]);
                if kind == Kind::Prophet && fixed.is_some() && variant.chunk.is_none() {
                    assert!(ledger.accepted > 40, "{} of {} accepted", ledger.accepted, ledger.drafted);
                    assert!(alone.ledger.passes < expected[5].ledger.passes, "fewer passes");
                }
                let report = llm.speculation().unwrap();
                assert_eq!(report.drafters[0].drafted, ledger.drafted);
                assert_eq!(report.drafters[0].accepted, ledger.accepted);
            }
        }
    }
}

#[test]
fn drafters_made_of_others_are_one() {
    let directory = checkpoint("composed-drafters", 512);
    let expected: Vec<Completion> = load(&directory, &options()).generate(requests()).unwrap();
    for fixed in [None, Some(9)] {
        let members = || -> Vec<Box<dyn Drafter>> {
            let known = Tester::boxed(Kind::Prophet, answers(&expected));
            vec![known, Tester::boxed(Kind::Dice, HashMap::new()), Box::new(TokenRecycling::default())]
        };
        let inner: Box<dyn Drafter> = Box::new(Composed::new(members()).unwrap());
        let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(Composed::new(vec![inner]).unwrap())];
        let speculation = Speculation { drafters, draft_tokens: fixed };
        let llm = Llm::load(&directory.0, &options(), speculation, &|_| ()).unwrap();
        for (got, expected) in llm.generate(requests()).unwrap().iter().zip(&expected) {
            assert_eq!(bits(got), bits(expected), "{fixed:?}");
        }
        assert_eq!(llm.take_warnings(), [""; 0]);
        assert!(llm.ledger().drafted > 0);
        let report = llm.speculation().unwrap();
        assert_eq!((report.drafters.len(), report.drafters[0].drafted), (1, llm.ledger().drafted));
        assert_eq!(report.drafters[0].accepted, llm.ledger().accepted);
    }
}

#[test]
fn drafts_stop_where_the_answer_does() {
    let directory = checkpoint("drafts-ends", 60);
    let plain = load(&directory, &options());
    for max_tokens in [1, 2, 3, 5, 1000] {
        let ask = || Request {
            prompt: Prompt::Tokens(prompt(2)),
            sampling: SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() },
        };
        let expected = plain.generate(vec![ask()]).unwrap().remove(0);
        let truth = HashMap::from([(prompt(2), expected.token_ids.clone())]);
        let drafters = vec![Tester::boxed(Kind::Prophet, truth)];
        let speculation = Speculation { drafters, draft_tokens: Some(12) };
        let llm = Llm::load(&directory.0, &options(), speculation, &|_| ()).unwrap();
        let got = llm.generate(vec![ask()]).unwrap().remove(0);
        assert_eq!((got.token_ids, got.finish_reason), (expected.token_ids, expected.finish_reason));
        assert!(max_tokens > 1 || got.ledger.drafted == 0, "nothing to draft for the only token");
    }
}

#[test]
fn bad_drafters_are_named_and_asked_no_more() {
    let directory = checkpoint("bad-drafters", 512);
    let plain = load(&directory, &options());
    let expected: Vec<Completion> = plain.generate(requests()).unwrap();
    for (kind, reason) in [(Kind::Stranger, "1073741824"), (Kind::Fails, "something else"), (Kind::Deaf, "silence")] {
        let llm = speculating(&directory, &options(), kind, None, &expected);
        for (got, expected) in llm.generate(requests()).unwrap().iter().zip(&expected) {
            assert_eq!(bits(got), bits(expected), "{kind:?}");
        }
        let warnings = llm.take_warnings();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("tester") && warnings[0].contains(reason), "{warnings:?}");
        assert_eq!(llm.take_warnings(), [""; 0]);
        assert!(llm.speculation().unwrap().drafters[0].stopped.as_ref().unwrap().contains(reason));
    }
}
