//! `farthing.reasoning`: how long a model may think.

use std::sync::Arc;

use farthing::error::Error;
use farthing::reasoning::{self, BitSet, Ramp, Reentry, Role, Wishes};
use numpy::{PyReadwriteArray1, PyReadwriteArrayDyn};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::exception;

/// The spellings of a vocabulary.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Lexicon(pub(crate) Arc<reasoning::Lexicon>);

#[pymethods]
impl Lexicon {
    #[new]
    fn new(spellings: Vec<Vec<u8>>) -> Lexicon {
        Lexicon(Arc::new(reasoning::Lexicon::new(spellings.iter().map(Vec::as_slice))))
    }

    /// A vocabulary without spellings: tokens that end a sentence, tokens that end inside a character.
    #[staticmethod]
    fn unspelled(boundary: Vec<u32>, incomplete_utf8: Vec<u32>) -> Lexicon {
        let set = |ids: Vec<u32>| ids.into_iter().collect::<BitSet>();
        Lexicon(Arc::new(reasoning::Lexicon::unspelled(set(boundary), set(incomplete_utf8))))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }
}

/// Checked wishes for looks ahead.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Probe(reasoning::Probe);

#[pymethods]
impl Probe {
    #[new]
    #[pyo3(signature = (*, every, suffix, entropy, variance, alpha, confidence, answer_tokens, until, most))]
    fn new(
        every: Option<u32>,
        suffix: Option<String>,
        entropy: f32,
        variance: f32,
        alpha: f32,
        confidence: f32,
        answer_tokens: u32,
        until: String,
        most: u32,
    ) -> PyResult<Probe> {
        let probe =
            reasoning::Probe { every, suffix, entropy, variance, alpha, confidence, answer_tokens, until, most };
        probe.validate().map_err(exception)?;
        Ok(Probe(probe))
    }
}

/// Checked wishes for thinking.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Policy(pub(crate) reasoning::Policy);

#[pymethods]
impl Policy {
    #[new]
    #[pyo3(signature = (*, budget, cap, soft_ratio, ramp, margin, grace, min_think, answer_reserve, ban, ban_words,
        loop_guard, probe, reentry, start, end, message))]
    fn new(
        budget: Option<u32>,
        cap: Option<u32>,
        soft_ratio: f32,
        ramp: Option<&str>,
        margin: f32,
        grace: Option<u32>,
        min_think: u32,
        answer_reserve: Option<u32>,
        ban: Vec<u32>,
        ban_words: Vec<String>,
        loop_guard: bool,
        probe: Option<&Probe>,
        reentry: &str,
        start: Option<String>,
        end: Option<String>,
        message: Option<String>,
    ) -> PyResult<Policy> {
        let wrong = |name, got: &str, expected| exception(Error::argument(name, format!("{got:?}"), expected));
        let ramp = match ramp {
            None => None,
            Some("linear") => Some(Ramp::Linear),
            Some("sigmoid") => Some(Ramp::Sigmoid),
            Some(other) => return Err(wrong("ramp", other, "sigmoid, linear or None")),
        };
        let reentry = match reentry {
            "rearm" => Reentry::Rearm,
            "ban" => Reentry::Ban,
            other => return Err(wrong("reentry", other, "rearm or ban")),
        };
        let policy = reasoning::Policy {
            budget,
            cap,
            soft_ratio,
            ramp,
            margin,
            grace,
            min_think,
            answer_reserve,
            ban,
            ban_words,
            loop_guard,
            probe: probe.map(|probe| probe.0.clone()),
            reentry,
            start,
            end,
            message,
        };
        policy.validate().map_err(exception)?;
        Ok(Policy(policy))
    }

    /// At most so many thinking tokens, and nothing else.
    #[staticmethod]
    fn hard(tokens: u32) -> Policy {
        Policy(reasoning::Policy::hard(tokens))
    }

    /// The same with a cap.
    fn capped(&self, tokens: u32) -> Policy {
        Policy(reasoning::Policy { cap: Some(tokens), ..self.0.clone() })
    }
}

/// How a model marks its thinking.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct ThinkSpec(Arc<reasoning::ThinkSpec>);

#[pymethods]
impl ThinkSpec {
    /// Markers as token ids.
    #[staticmethod]
    fn of_ids(
        lexicon: &Lexicon,
        starts: Vec<Vec<u32>>,
        ends: Vec<Vec<u32>>,
        forced_close: Vec<u32>,
        tool_open: Vec<Vec<u32>>,
        tool_close: Vec<Vec<u32>>,
        eos: Vec<u32>,
        at_once: bool,
    ) -> PyResult<ThinkSpec> {
        let lists =
            [(Role::Start, starts), (Role::End, ends), (Role::ToolOpen, tool_open), (Role::ToolClose, tool_close)];
        let markers: Vec<(Role, Vec<u32>)> =
            lists.into_iter().flat_map(|(role, ids)| ids.into_iter().map(move |ids| (role, ids))).collect();
        let spec = reasoning::ThinkSpec::of_ids(Arc::clone(&lexicon.0), &markers, forced_close, eos, at_once);
        Ok(ThinkSpec(Arc::new(spec.map_err(exception)?)))
    }

    /// Markers in words, or the model's own; `encode` is called with texts. None when the model has none.
    #[staticmethod]
    fn of_text(
        lexicon: &Lexicon,
        encode: &Bound<'_, PyAny>,
        start: Option<String>,
        end: Option<String>,
        message: Option<String>,
        eos: Vec<u32>,
        template: Option<&str>,
    ) -> PyResult<Option<ThinkSpec>> {
        let mut raised = None;
        let mut encode = |text: &str| -> Result<Vec<u32>, Error> {
            encode.call1((text,)).and_then(|ids| ids.extract()).map_err(|error: PyErr| {
                let failed = Error::argument("tokenizer", &error, "one whose encode makes token ids of text");
                raised = Some(error);
                failed
            })
        };
        let policy = reasoning::Policy { start, end, message, ..reasoning::Policy::default() };
        policy.validate().map_err(exception)?;
        let lexicon = &lexicon.0;
        let pair = if policy.end.is_some() {
            None
        } else {
            let encode = std::cell::RefCell::new(&mut encode);
            let one = |text: &str| match encode.borrow_mut()(text).as_deref() {
                Ok(&[id]) => lexicon.spelling(id) == text.as_bytes(),
                _ => false,
            };
            reasoning::ThinkSpec::detect(one, template)
        };
        let Some(wishes) = Wishes::of(pair, &policy) else { return raised.map_or(Ok(None), Err) };
        let spec = reasoning::ThinkSpec::build(Arc::clone(lexicon), &wishes, &eos, &mut encode);
        match (spec, raised) {
            (_, Some(raised)) => Err(raised),
            (spec, None) => Ok(Some(ThinkSpec(Arc::new(spec.map_err(exception)?)))),
        }
    }

    /// What is written to end thinking by force.
    #[getter]
    fn forced_close(&self) -> Vec<u32> {
        self.0.forced_close().to_vec()
    }

    #[getter]
    fn eos(&self) -> Vec<u32> {
        self.0.eos().to_vec()
    }

    /// Whether the first generated token is thinking.
    #[getter]
    fn at_once(&self) -> bool {
        self.0.at_once()
    }
}

/// Follows one sequence.
#[pyclass(module = "farthing._core")]
pub(crate) struct Controller(reasoning::Controller);

#[pymethods]
impl Controller {
    #[new]
    fn new(spec: &ThinkSpec, policy: Option<&Policy>, prompt_ids: Vec<u32>, max_tokens: usize) -> PyResult<Controller> {
        let policy = policy.map(|policy| &policy.0);
        let controller = reasoning::Controller::new(Arc::clone(&spec.0), policy, &prompt_ids, max_tokens);
        Ok(Controller(controller.map_err(exception)?))
    }

    fn push(&mut self, token: u32) {
        self.0.push(token);
    }

    /// Takes in several tokens.
    fn extend(&mut self, tokens: Vec<u32>) {
        for token in tokens {
            self.0.push(token);
        }
    }

    /// Applies what is known of the next token to `logits` `(vocab,)`, or `(1, vocab)`.
    fn process(&self, mut logits: Logits<'_>) -> PyResult<()> {
        let row = match &mut logits {
            Logits::Row(array) => array.as_slice_mut(),
            Logits::Any(array) => array.as_slice_mut(),
        };
        let error = || PyValueError::new_err("logits: got an array with gaps, expected a contiguous row of float32");
        self.0.process(row.map_err(|_| error())?);
        Ok(())
    }

    fn peek(&self, drafts: Vec<u32>) -> usize {
        self.0.peek(&drafts)
    }

    fn permits(&self, token: u32) -> bool {
        self.0.permits(token)
    }

    /// Ends thinking by force as an early exit would.
    fn close(&mut self) {
        self.0.close(reasoning::Stop::EarlyExit);
    }

    fn copy(&self) -> Controller {
        Controller(self.0.clone())
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.0.phase().name()
    }

    #[getter]
    fn stop(&self) -> Option<&'static str> {
        self.0.stop().map(reasoning::Stop::name)
    }

    #[getter]
    fn forced(&self) -> Option<u32> {
        self.0.forced()
    }

    #[getter]
    fn dictated(&self) -> Vec<u32> {
        self.0.dictated_tokens().to_vec()
    }

    #[getter]
    fn is_thinking(&self) -> bool {
        self.0.is_thinking()
    }

    #[getter]
    fn thinking_tokens(&self) -> usize {
        self.0.thinking_tokens()
    }

    #[getter]
    fn forced_tokens(&self) -> usize {
        self.0.forced_tokens()
    }

    #[getter]
    fn answer_tokens(&self) -> usize {
        self.0.answer_tokens()
    }
}

/// A row of logits as Python gives it.
#[derive(FromPyObject)]
enum Logits<'py> {
    Row(PyReadwriteArray1<'py, f32>),
    Any(PyReadwriteArrayDyn<'py, f32>),
}
