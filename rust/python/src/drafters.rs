//! `farthing.speculative`: drafters that need no model, alone or on their way into an engine.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use farthing::error::Error;
use farthing::speculative::draft::{
    Composed, Draft, Drafter as Core, NGram, NGramMode, NGramOptions, NoTarget, Observed, SpeculateOptions, Suffix,
    SuffixCache as Cache, SuffixOptions, SuffixStore as Store, TextId, TokenRecycling,
};
use farthing::speculative::tree::{DraftTree, MOST_NODES};
use farthing_kernels::sample::{Sampling, TokenCounts};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::exception;

/// Token ids: a list, or an array of 32-bit or 64-bit integers.
fn token_ids(name: &str, given: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let id = |id: i64| {
        u32::try_from(id).map_err(|_| PyValueError::new_err(format!("{name}: got {id}, expected 0 to {}", u32::MAX)))
    };
    if let Ok(array) = given.cast::<PyArray1<i32>>() {
        let array: PyReadonlyArray1<'_, i32> = array.try_readonly()?;
        return array.as_array().iter().map(|&token| id(token.into())).collect();
    }
    if let Ok(array) = given.cast::<PyArray1<i64>>() {
        let array: PyReadonlyArray1<'_, i64> = array.try_readonly()?;
        return array.as_array().iter().map(|&token| id(token)).collect();
    }
    if let Ok(array) = given.cast::<PyArray1<u32>>() {
        let array: PyReadonlyArray1<'_, u32> = array.try_readonly()?;
        return Ok(array.as_array().to_vec());
    }
    given.extract::<Vec<i64>>()?.into_iter().map(id).collect()
}

/// What a drafter is, so that each engine can have one of its own.
#[derive(Clone)]
enum Recipe {
    NGram(NGramOptions),
    Suffix(Option<Arc<Store>>, SuffixOptions),
    Recycling(TokenRecycling),
    Composed(Vec<Recipe>),
}

impl Recipe {
    fn make(&self) -> Result<Box<dyn Core>, Error> {
        Ok(match self {
            Recipe::NGram(options) => Box::new(NGram::new(*options)?),
            Recipe::Suffix(store, options) => Box::new(Suffix::new(store.clone(), *options)?),
            Recipe::Recycling(table) => Box::new(table.sharing()),
            Recipe::Composed(members) => {
                Box::new(Composed::new(members.iter().map(Recipe::make).collect::<Result<_, _>>()?)?)
            }
        })
    }
}

/// What drafters that are driven by hand draft for.
static ALONE: LazyLock<NoTarget> = LazyLock::new(NoTarget::default);

struct Standalone {
    drafter: Box<dyn Core>,
    /// All committed tokens of each request.
    texts: HashMap<u64, Vec<u32>>,
}

/// A drafter, driven by hand.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Drafter {
    recipe: Recipe,
    state: Mutex<Standalone>,
}

impl Drafter {
    fn new(recipe: Recipe) -> PyResult<Drafter> {
        let drafter = recipe.make().map_err(exception)?;
        Ok(Drafter { recipe, state: Mutex::new(Standalone { drafter, texts: HashMap::new() }) })
    }

    /// Those for an engine: same rules, same stores, same tables, no requests. The engine composes by itself.
    pub(crate) fn for_engine(&self) -> PyResult<Vec<Box<dyn Core>>> {
        let recipes = match &self.recipe {
            Recipe::Composed(members) => &members[..],
            one => std::slice::from_ref(one),
        };
        recipes.iter().map(|recipe| recipe.make().map_err(exception)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Standalone> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Token ids, parents (-1 without), classes and ratios of a draft.
type Drafted = (Vec<u32>, Vec<i32>, Vec<u16>, Vec<f32>);

#[pymethods]
impl Drafter {
    #[staticmethod]
    fn ngram(
        mode: &str,
        min_n: Option<usize>,
        max_n: Option<usize>,
        max_tokens: Option<usize>,
    ) -> PyResult<(Drafter, (usize, usize, usize))> {
        let Some(mode) = NGramMode::ALL.into_iter().find(|known| known.name() == mode) else {
            let known = NGramMode::ALL.map(NGramMode::name).join(", ");
            return Err(PyValueError::new_err(format!("mode: got {mode:?}, expected one of {known}")));
        };
        let usual = NGramOptions::of(mode);
        // What is given moves what is not.
        let max_n = max_n.unwrap_or(usual.max_n.max(min_n.unwrap_or(0)));
        let min_n = min_n.unwrap_or(if mode == NGramMode::Transformers { 1 } else { max_n });
        let max_tokens = max_tokens.unwrap_or(usual.max_tokens);
        let drafter = Drafter::new(Recipe::NGram(NGramOptions { mode, min_n, max_n, max_tokens }))?;
        Ok((drafter, (min_n, max_n, max_tokens)))
    }

    #[staticmethod]
    fn suffix(
        store: Option<PyRef<'_, SuffixStore>>,
        min_match: usize,
        min_probability: f32,
        tree: bool,
    ) -> PyResult<Drafter> {
        let options = SuffixOptions { min_match, min_probability, tree };
        Drafter::new(Recipe::Suffix(store.map(|store| Arc::clone(&store.0)), options))
    }

    #[staticmethod]
    fn recycling() -> PyResult<Drafter> {
        Drafter::new(Recipe::Recycling(TokenRecycling::default()))
    }

    #[staticmethod]
    fn composed(members: Vec<PyRef<'_, Drafter>>) -> PyResult<Drafter> {
        Drafter::new(Recipe::Composed(members.iter().map(|member| member.recipe.clone()).collect()))
    }

    #[getter]
    fn name(&self) -> String {
        self.lock().drafter.name().to_owned()
    }

    #[getter]
    fn wants_top(&self) -> usize {
        self.lock().drafter.wants().top
    }

    fn begin(&self, py: Python<'_>, request: u64, prompt: &Bound<'_, PyAny>) -> PyResult<()> {
        let prompt = token_ids("prompt", prompt)?;
        py.detach(|| {
            let mut state = self.lock();
            state.drafter.begin(request, &prompt)?;
            state.texts.insert(request, prompt);
            Ok(())
        })
        .map_err(|error: Error| exception(error))
    }

    fn observe(
        &self,
        request: u64,
        tokens: &Bound<'_, PyAny>,
        rows: Option<&Bound<'_, PyAny>>,
        top: Option<PyReadonlyArray2<'_, u32>>,
    ) -> PyResult<()> {
        let tokens = token_ids("tokens", tokens)?;
        let rows = rows.map_or_else(|| Ok(Vec::new()), |rows| token_ids("rows", rows))?;
        let top: Vec<u32> = match &top {
            Some(top) if top.shape()[0] == rows.len() => top.as_array().iter().copied().collect(),
            Some(top) => {
                let (got, expected) = (top.shape()[0], rows.len());
                return Err(PyValueError::new_err(format!(
                    "top: got {got} rows, expected {expected}, one for each of rows"
                )));
            }
            None => Vec::new(),
        };
        let mut state = self.lock();
        let Standalone { drafter, texts } = &mut *state;
        drafter
            .observe(&Observed { request, tokens: &tokens, rows: &rows, top: &top, ..Observed::default() })
            .map_err(exception)?;
        texts.entry(request).or_default().extend(tokens);
        Ok(())
    }

    fn draft(&self, request: u64, budget: usize) -> PyResult<Drafted> {
        let mut state = self.lock();
        let Standalone { drafter, texts } = &mut *state;
        let mut tree = DraftTree::default();
        let tokens = texts.get(&request).map_or(&[][..], Vec::as_slice);
        if !tokens.is_empty() {
            let (sampling, counts) = (Sampling::default(), TokenCounts::default());
            let budget = budget.min(MOST_NODES);
            let draft =
                Draft { request, tokens, budget, least: 0.0, sampling: &sampling, counts: &counts, tree: &mut tree };
            drafter.draft(&*ALONE, &mut [draft]).map_err(exception)?;
        }
        let nodes = tree.nodes();
        Ok((
            nodes.iter().map(|node| node.token).collect(),
            nodes.iter().map(|node| node.parent.map_or(-1, i32::from)).collect(),
            nodes.iter().map(|node| node.class.into()).collect(),
            nodes.iter().map(|node| node.ratio).collect(),
        ))
    }

    fn end(&self, request: u64) {
        let mut state = self.lock();
        state.drafter.end(request);
        state.texts.remove(&request);
    }
}

/// Answers for requests to come.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct SuffixStore(Arc<Store>);

#[pymethods]
impl SuffixStore {
    #[new]
    fn new(max_bytes: usize) -> PyResult<SuffixStore> {
        Ok(SuffixStore(Arc::new(Store::new(max_bytes).map_err(exception)?)))
    }

    fn add(&self, py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let tokens = token_ids("token_ids", tokens)?;
        py.detach(|| self.0.append(self.0.open(), &tokens));
        Ok(())
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.save(&path)).map_err(exception)
    }

    fn load(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.load(&path)).map_err(exception)
    }

    fn clear(&self) {
        self.0.clear();
    }

    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    #[getter]
    fn texts(&self) -> usize {
        self.0.texts()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }
}

/// Token ids, parents (-1 without), probabilities, score and length of the match.
type Speculation = (Vec<u32>, Vec<i32>, Vec<f32>, f32, usize);

/// The interface of arctic-inference's cache, with numbers for requests.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct SuffixCache(Mutex<Cache>);

impl SuffixCache {
    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl SuffixCache {
    #[new]
    fn new(depth: usize, max_answers: Option<usize>) -> SuffixCache {
        SuffixCache(Mutex::new(Cache::new(depth, max_answers)))
    }

    fn start(&self, py: Python<'_>, request: u64, prompt: &Bound<'_, PyAny>) -> PyResult<Option<TextId>> {
        let prompt = token_ids("prompt_token_ids", prompt)?;
        py.detach(|| {
            let mut cache = self.lock();
            cache.start(request, &prompt)?;
            Ok(cache.answer(request))
        })
        .map_err(|error: Error| exception(error))
    }

    fn stop(&self, request: u64) -> PyResult<()> {
        self.lock().stop(request).map_err(exception)
    }

    fn append(&self, py: Python<'_>, request: u64, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let tokens = token_ids("token_ids", tokens)?;
        py.detach(|| self.lock().append(request, &tokens)).map_err(exception)
    }

    fn forget(&self, py: Python<'_>, answer: TextId) {
        py.detach(|| self.lock().forget(answer));
    }

    fn retire(&self, answer: TextId) {
        self.lock().retire(answer);
    }

    fn speculate(
        &self,
        request: u64,
        context: &Bound<'_, PyAny>,
        max_tokens: usize,
        max_factor: f32,
        max_offset: f32,
        min_probability: f32,
        tree: bool,
    ) -> PyResult<Speculation> {
        let context = token_ids("context", context)?;
        let options = SpeculateOptions { max_tokens, max_factor, max_offset, min_probability, tree };
        let found = self.lock().speculate(request, &context, &options).map_err(exception)?;
        let parents = found.parents.iter().map(|parent| parent.map_or(-1, i32::from)).collect();
        Ok((found.tokens, parents, found.probabilities, found.score, found.matched))
    }

    #[getter]
    fn tokens(&self) -> usize {
        self.lock().tokens()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.lock().bytes()
    }
}
