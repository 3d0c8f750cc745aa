//! How a loaded model marks its thinking, and controllers for its requests.

use super::lock;
use super::request::SamplingParams;
use crate::error::Error;
use crate::load::Tokenizer;
use crate::load::text::Text;
use crate::reasoning::{Controller, Lexicon, Pair, Policy, ThinkSpec, Wishes};
use std::sync::{Arc, Mutex, OnceLock};

/// Specifications that are kept: one for each way in which requests name markers.
const KEPT: usize = 8;

/// What a model's thinking is known by, made when it is first needed.
#[derive(Debug)]
pub(super) struct Markings {
    /// The model's own markers.
    pair: Option<&'static Pair>,
    lexicon: OnceLock<Arc<Lexicon>>,
    /// Last used last; whether the end of the answer ends thinking is part of the key.
    specs: Mutex<Vec<(Wishes, bool, Arc<ThinkSpec>)>>,
}

impl Markings {
    /// Looks for known markers in the vocabulary, then in the chat template.
    pub(super) fn of(text: &Text) -> Markings {
        let has = |token: &str| text.tokenizer.as_ref().is_some_and(|it| it.token_to_id(token).is_some());
        let pair = text.tokenizer.as_ref().and_then(|_| ThinkSpec::detect(has, text.template_source.as_deref()));
        Markings { pair, lexicon: OnceLock::new(), specs: Mutex::new(Vec::new()) }
    }

    /// The spellings of the vocabulary.
    pub(super) fn lexicon(&self, tokenizer: &Tokenizer) -> Arc<Lexicon> {
        Arc::clone(self.lexicon.get_or_init(|| Arc::new(Lexicon::of(tokenizer))))
    }

    /// Who follows an answer of at most `max_tokens` tokens behind `prompt`; nobody when neither model nor request names
    /// markers.
    pub(super) fn controller(
        &self,
        text: &Text,
        sampling: &SamplingParams,
        prompt: &[u32],
        max_tokens: usize,
    ) -> Result<Option<Controller>, Error> {
        let policy = sampling.thinking.as_ref();
        let wishes = match policy {
            Some(policy) => Wishes::of(self.pair, policy),
            None => Wishes::of(self.pair, &Policy::default()),
        };
        let Some(tokenizer) = &text.tokenizer else {
            let missing = || Error::unsupported("control of thinking without a tokenizer", "leave it None");
            return if policy.is_some() { Err(missing()) } else { Ok(None) };
        };
        let Some(wishes) = wishes else {
            let missing = || {
                let works = "name what the model writes: thinking=Policy(start=\"<think>\", end=\"</think>\"), or \
                    Policy(end=\"Answer:\") when it thinks from its first token on";
                Error::unsupported("a thinking budget for a model without thinking markers", works)
            };
            return if policy.is_some() { Err(missing()) } else { Ok(None) };
        };
        let spec = self.spec(text, tokenizer, wishes, sampling.ignore_eos)?;
        Controller::new(spec, policy, prompt, max_tokens).map(Some)
    }

    fn spec(
        &self,
        text: &Text,
        tokenizer: &Tokenizer,
        wishes: Wishes,
        ignore_eos: bool,
    ) -> Result<Arc<ThinkSpec>, Error> {
        let mut specs = lock(&self.specs);
        if let Some(at) = specs.iter().position(|(kept, ignores, _)| *kept == wishes && *ignores == ignore_eos) {
            let kept = specs.remove(at);
            let spec = Arc::clone(&kept.2);
            specs.push(kept);
            return Ok(spec);
        }
        let eos = if ignore_eos { &[][..] } else { &text.end_tokens };
        let spec = Arc::new(ThinkSpec::of_tokenizer(tokenizer, self.lexicon(tokenizer), &wishes, eos)?);
        if specs.len() == KEPT {
            specs.remove(0);
        }
        specs.push((wishes, ignore_eos, Arc::clone(&spec)));
        Ok(spec)
    }
}
