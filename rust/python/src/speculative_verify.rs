//! `farthing.speculative`: which drafted tokens stay.

use farthing::error::Error;
use farthing::speculative::verify::{
    self, Coin, Draft, Float, Origin, Rows, Seeded, Shape, Siblings, Verdict, draw_coupled, lossy,
};
use farthing_kernels::math::log;
use farthing_kernels::sample::TokenCounts;
use numpy::{
    Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::array::tuple;
use crate::errors::exception;
use crate::llm::Sampling;

/// A coin that Python flips.
struct Called<'py> {
    coin: Bound<'py, PyAny>,
    /// Its first exception; decisions after it are void.
    error: Option<PyErr>,
}

impl Called<'_> {
    fn keep<T>(&mut self, decided: PyResult<T>, void: T) -> T {
        decided.unwrap_or_else(|error| {
            self.error.get_or_insert(error);
            void
        })
    }
}

impl Coin for Called<'_> {
    fn flip(&mut self, part: f64, whole: f64) -> bool {
        if self.error.is_some() {
            return true;
        }
        let decided = self.coin.call_method1("flip", (part, whole)).and_then(|side| side.is_truthy());
        self.keep(decided, true)
    }

    fn draw(&mut self, weights: &[f64]) -> usize {
        if self.error.is_some() {
            return 0;
        }
        let weights = PyArray1::from_slice(self.coin.py(), weights);
        let length = weights.len();
        let decided = self.coin.call_method1("draw", (weights,)).and_then(|index| index.extract::<usize>());
        let decided = decided.and_then(|index| {
            let error = || PyValueError::new_err(format!("coin.draw: got {index}, expected an index below {length}"));
            (index < length).then_some(index).ok_or_else(error)
        });
        self.keep(decided, 0)
    }
}

/// The options of a rule.
struct Rule<'a> {
    name: &'a str,
    distinct: bool,
    seed: u64,
    position: u64,
    /// What the lossy rules take.
    options: (f64, f64),
}

impl Rule<'_> {
    fn run<F: Float>(
        &self,
        p: &Rows<'_, F>,
        q: Option<&Rows<'_, F>>,
        shape: &Shape,
        coin: &mut impl Coin,
    ) -> Result<Verdict, Error> {
        let siblings = if self.distinct { Siblings::Distinct } else { Siblings::Independent };
        let origin = q.map_or(Origin::OneHot, |q| Origin::Sampled { q, siblings });
        let draft = Draft { shape, origin };
        let (first, second) = self.options;
        match self.name {
            "tokens" => verify::tokens(p, &draft, coin),
            "block" => verify::block(p, &draft, coin),
            "tree" => verify::rounds(p, &draft, coin),
            "traversal" => verify::traversal(p, &draft, coin),
            "gumbel" => verify::coupled(p, shape, self.seed, self.position),
            "typical" => lossy::typical(p, shape, first, second),
            "threshold" => lossy::threshold(p, shape, first, second, coin),
            "relaxed" => lossy::relaxed(p, shape, first as usize, second),
            "ensemble" => lossy::ensemble(p, &draft, first, coin),
            other => Err(Error::argument("rule", other, "a rule of farthing.speculative")),
        }
    }
}

/// The tokens of a draft and where they hang; -1 is the last committed token.
fn shape(tokens: &[i64], parents: Option<&[i64]>) -> PyResult<Shape> {
    let mut ids = Vec::with_capacity(tokens.len());
    for &token in tokens {
        let error = || PyValueError::new_err(format!("tokens: got {token}, expected ids of 0 or above"));
        ids.push(u32::try_from(token).map_err(|_| error())?);
    }
    let Some(parents) = parents else { return Ok(Shape::chain(&ids)) };
    let mut nodes = Vec::with_capacity(parents.len());
    for &parent in parents {
        let error = || PyValueError::new_err(format!("parents: got {parent}, expected -1 or an earlier node"));
        nodes.push(if parent == -1 { None } else { Some(usize::try_from(parent).map_err(|_| error())?) });
    }
    Shape::tree(&ids, &nodes).map_err(exception)
}

/// The emitted tokens and the rows that they were decided at.
type Emitted<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);
/// The same and their log-probabilities.
type Verified<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>);

fn emitted<'py>(py: Python<'py>, verdict: &Verdict) -> Emitted<'py> {
    let tokens = PyArray1::from_iter(py, verdict.tokens.iter().map(|&token| i64::from(token)));
    (tokens, PyArray1::from_iter(py, verdict.rows.iter().map(|&row| row as i64)))
}

/// Runs a rule on the laws `p`: (k + 1, V) of a draft of k tokens; `q`: (r, V) of the same type, or none for one-hot drafts.
#[pyfunction]
#[pyo3(signature = (rule, p, q, tokens, parents, *, distinct, seed, position, coin, options))]
pub(crate) fn verify_draft<'py>(
    py: Python<'py>,
    rule: &str,
    p: &Bound<'py, PyAny>,
    q: Option<&Bound<'py, PyAny>>,
    tokens: PyReadonlyArray1<'py, i64>,
    parents: Option<PyReadonlyArray1<'py, i64>>,
    distinct: bool,
    seed: u64,
    position: u64,
    coin: Option<Bound<'py, PyAny>>,
    options: (f64, f64),
) -> PyResult<Verified<'py>> {
    let parents = parents.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let shape = shape(tokens.as_slice()?, parents)?;
    let rule = Rule { name: rule, distinct, seed, position, options };
    if let Ok(p) = p.cast::<PyArray2<f32>>() {
        let q = q.map(|q| q.cast::<PyArray2<f32>>()).transpose()?;
        return verify_of(py, &rule, p.readonly(), q.map(PyArrayMethods::readonly), &shape, coin);
    }
    let q = q.map(|q| q.cast::<PyArray2<f64>>()).transpose()?;
    verify_of(py, &rule, p.cast::<PyArray2<f64>>()?.readonly(), q.map(PyArrayMethods::readonly), &shape, coin)
}

fn verify_of<'py, F: Float + Element + Sync>(
    py: Python<'py>,
    rule: &Rule<'_>,
    p: PyReadonlyArray2<'py, F>,
    q: Option<PyReadonlyArray2<'py, F>>,
    shape: &Shape,
    coin: Option<Bound<'py, PyAny>>,
) -> PyResult<Verified<'py>> {
    let width = p.shape()[1];
    let q_width = q.as_ref().map_or(width, |q| q.shape()[1]);
    let p = p.as_slice()?;
    let q = q.as_ref().map(PyReadonlyArray2::as_slice).transpose()?;
    let laws = || -> Result<_, Error> {
        Ok((Rows::new("p", p, width)?, q.map(|q| Rows::of_draft(q, q_width, shape)).transpose()?))
    };
    let logprobs = |p: &Rows<'_, F>, verdict: &Verdict| -> Vec<f32> {
        let pairs = verdict.tokens.iter().zip(&verdict.rows);
        pairs.map(|(&token, &row)| log(p.law(row).of(token) as f32)).collect()
    };
    let (verdict, logprobs) = match coin {
        Some(coin) => {
            let (p, q) = laws().map_err(exception)?;
            let mut called = Called { coin, error: None };
            let verdict = rule.run(&p, q.as_ref(), shape, &mut called).map_err(exception)?;
            if let Some(error) = called.error {
                return Err(error);
            }
            let logprobs = logprobs(&p, &verdict);
            (verdict, logprobs)
        }
        None => py
            .detach(|| -> Result<_, Error> {
                let (p, q) = laws()?;
                let verdict = rule.run(&p, q.as_ref(), shape, &mut Seeded::new(rule.seed, rule.position))?;
                let logprobs = logprobs(&p, &verdict);
                Ok((verdict, logprobs))
            })
            .map_err(exception)?,
    };
    let (tokens, rows) = emitted(py, &verdict);
    Ok((tokens, rows, PyArray1::from_vec(py, logprobs)))
}

/// The greedy rule on logits `(k + 1, V)`.
#[pyfunction]
#[pyo3(signature = (logits, tokens, parents))]
pub(crate) fn verify_greedy<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    tokens: PyReadonlyArray1<'py, i64>,
    parents: Option<PyReadonlyArray1<'py, i64>>,
) -> PyResult<Emitted<'py>> {
    let parents = parents.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let shape = shape(tokens.as_slice()?, parents)?;
    let verdict = if let Ok(logits) = logits.cast::<PyArray2<f32>>() {
        verify::greedy(logits.readonly().as_slice()?, logits.shape()[1], &shape)
    } else {
        let logits = logits.cast::<PyArray2<f64>>()?;
        verify::greedy(logits.readonly().as_slice()?, logits.shape()[1], &shape)
    };
    Ok(emitted(py, &verdict.map_err(exception)?))
}

/// A token of each row of laws `(n, V)` by the noise of a seed and a position each.
#[pyfunction]
pub(crate) fn draw_gumbel<'py>(
    py: Python<'py>,
    p: PyReadonlyArray2<'py, f32>,
    seeds: Vec<u64>,
    positions: Vec<u64>,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let width = p.shape()[1];
    let p = p.as_slice()?;
    let tokens = py.detach(|| -> Result<Vec<i64>, Error> {
        let p = Rows::new("p", p, width)?;
        let places = seeds.iter().zip(&positions).enumerate();
        places.map(|(row, (&seed, &at))| Ok(i64::from(draw_coupled(p.law(row), seed, at)?))).collect()
    });
    Ok(PyArray1::from_vec(py, tokens.map_err(exception)?))
}

/// Turns logits `(k + 1, V)` into laws, in place.
#[pyfunction]
#[pyo3(signature = (logits, sampling, tokens, parents, *, prompt, output, allowed))]
pub(crate) fn draft_probabilities<'py>(
    py: Python<'py>,
    mut logits: PyReadwriteArray2<'py, f32>,
    sampling: PyRef<'py, Sampling>,
    tokens: PyReadonlyArray1<'py, i64>,
    parents: Option<PyReadonlyArray1<'py, i64>>,
    prompt: Vec<u32>,
    output: Vec<u32>,
    allowed: Option<PyReadonlyArray2<'py, bool>>,
) -> PyResult<()> {
    let parents = parents.as_ref().map(PyReadonlyArray1::as_slice).transpose()?;
    let shape = shape(tokens.as_slice()?, parents)?;
    let &[rows, width] = logits.shape() else { unreachable!("two axes") };
    if let Some(allowed) = &allowed
        && allowed.shape() != [rows, width]
    {
        let (got, expected) = (tuple(allowed.shape()), tuple(&[rows, width]));
        return Err(PyValueError::new_err(format!("allowed: got shape {got}, expected {expected}")));
    }
    let words: Option<Vec<Vec<u64>>> = allowed.map(|allowed| {
        let word = |bits: &[bool]| bits.iter().enumerate().fold(0, |word, (at, &bit)| word | u64::from(bit) << at);
        let allowed = allowed.as_array();
        let rows = allowed.rows().into_iter();
        rows.map(|row| row.to_vec().chunks(64).map(word).collect()).collect()
    });
    let sampling = sampling.0.at(0, prompt.len() + output.len());
    let logits = logits.as_slice_mut()?;
    let mut counts = TokenCounts::of(&prompt, &output);
    let allowed = |row: usize| words.as_ref().map(|words| &words[row][..]);
    py.detach(|| verify::laws(logits, width, &shape, &sampling, &mut counts, allowed)).map_err(exception)
}

/// Tokens that two vocabularies share.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Intersection(verify::Intersection);

#[pymethods]
impl Intersection {
    #[new]
    fn new(drafter: Vec<Vec<u8>>, target: Vec<Vec<u8>>) -> Intersection {
        Intersection(verify::Intersection::new(drafter, target))
    }

    /// The target's id of each of the drafter's tokens, -1 for none.
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        PyArray1::from_iter(py, self.0.tokens().iter().map(|token| token.map_or(-1, i64::from)))
    }

    /// Restricts laws `(n, V)` in place.
    fn restrict(&self, py: Python<'_>, mut q: PyReadwriteArray2<'_, f32>) -> PyResult<()> {
        let width = q.shape()[1].max(1);
        let q = q.as_slice_mut()?;
        py.detach(|| q.chunks_mut(width).try_for_each(|q| self.0.restrict(q))).map_err(exception)
    }

    /// Scatters laws `(n, V)` of the drafter into the target's ids.
    fn scatter<'py>(
        &self,
        py: Python<'py>,
        q: PyReadonlyArray2<'py, f32>,
        target: usize,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let rows = q.shape()[0];
        let width = q.shape()[1].max(1);
        let q = q.as_slice()?;
        let scattered = py.detach(|| -> Result<Vec<f32>, Error> {
            let mut scattered = Vec::with_capacity(rows * target);
            for q in q.chunks(width) {
                scattered.extend(self.0.scatter(q)?);
            }
            Ok(scattered)
        });
        PyArray1::from_vec(py, scattered.map_err(exception)?).reshape([rows, target])
    }
}
