//! `farthing.moe`: which experts the rows of an array go to, and how evenly.

use farthing::model::feed_forward::router::{Biases, Choice, GroupScore, Groups, RouterSpec as Spec};
use farthing::moe::RoutingStatistics as Counts;
use farthing_kernels::score::Score;
use numpy::{
    PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::array::{Array, tuple};
use crate::errors::exception;
use crate::floats::FloatsMut;
use crate::matrix::PackedMatrix;
use crate::product::{Target, product, threads};

/// Logits that one thread routes in about half a millisecond; to wake the others for less takes longer than it saves.
const LOGITS_ALONE: usize = 1 << 18;

fn one_of<T: Copy>(name: &str, got: &str, all: &[(&str, T)]) -> PyResult<T> {
    all.iter().find(|(known, _)| *known == got).map(|&(_, value)| value).ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|(name, _)| *name).collect();
        PyValueError::new_err(format!("{name}: got {got:?}, expected one of {}", known.join(", ")))
    })
}

/// How logits become experts and weights.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct RouterSpec(Spec);

#[pymethods]
impl RouterSpec {
    #[new]
    #[pyo3(signature = (
        *, num_experts, top_k, score, n_group, topk_group, group_score, masked_fill, post, norm_eps, scale
    ))]
    fn new(
        num_experts: usize,
        top_k: usize,
        score: &str,
        n_group: usize,
        topk_group: usize,
        group_score: &str,
        masked_fill: f32,
        post: &str,
        norm_eps: Option<f32>,
        scale: f32,
    ) -> PyResult<RouterSpec> {
        let group_scores = [("top2", GroupScore::TopTwo), ("max", GroupScore::Maximum)];
        let scores = Score::ALL.map(|score| (score.name(), score));
        let groups = Groups {
            count: n_group,
            kept: topk_group,
            score: one_of("group_score", group_score, &group_scores)?,
            masked_fill,
        };
        let spec = Spec {
            experts: num_experts,
            top_k,
            score: one_of("score", score, &scores)?,
            groups: (n_group != 1 || topk_group != 1).then_some(groups),
            post: one_of("post", post, &scores)?,
            renormalize: norm_eps,
            scale,
            // Python's spec tells its caller; nothing here depends on it.
            apply_to_input: false,
        };
        spec.check().map_err(exception)?;
        Ok(RouterSpec(spec))
    }
}

/// Experts `(t, k)`, their weights `(t, k)`, and the share of all scores `(t,)` that they have.
type Routed<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<f32>>, Bound<'py, PyArray1<f32>>);

/// Routes the rows of `x`: (t, h) where there is a weight, else of logits (t, e).
#[pyfunction]
#[pyo3(signature = (x, spec, weight, *, logit_bias, selection_bias, table, token_ids))]
pub(crate) fn route<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    spec: PyRef<'py, RouterSpec>,
    weight: Option<PyRef<'py, PackedMatrix>>,
    logit_bias: Option<Bound<'py, PyAny>>,
    selection_bias: Option<Bound<'py, PyAny>>,
    table: Option<PyReadonlyArray2<'py, i64>>,
    token_ids: Option<PyReadonlyArray1<'py, i64>>,
) -> PyResult<Routed<'py>> {
    let spec = spec.0;
    let (num_experts, top_k) = (spec.experts, spec.top_k);
    let x = Array::of("x", x, false)?;
    let width = match &weight {
        Some(weight) => {
            spec.check_weight(&weight.0).map_err(exception)?;
            weight.0.columns()
        }
        None => num_experts,
    };
    let &[rows, columns] = x.shape() else {
        return Err(PyValueError::new_err(format!("x: got shape {}, expected (T, {width})", tuple(x.shape()))));
    };
    if columns != width {
        let what = if weight.is_some() { "inputs of the weight" } else { "logits" };
        return Err(PyValueError::new_err(format!(
            "x: got shape {}, expected (T, {width}), {width} {what}",
            tuple(x.shape())
        )));
    }
    let bias_of = |name: &str, bias: Option<Bound<'py, PyAny>>| -> PyResult<Option<Vec<f32>>> {
        let Some(bias) = bias else { return Ok(None) };
        let bias = Array::of(name, &bias, false)?;
        if bias.shape() != [num_experts] {
            let got = tuple(bias.shape());
            return Err(PyValueError::new_err(format!("{name}: got shape {got}, expected ({num_experts},)")));
        }
        let mut wide = vec![0.0; num_experts];
        bias.floats()?.widen(&mut wide);
        Ok(Some(wide))
    };
    let (logit_bias, selection_bias) = (bias_of("logit_bias", logit_bias)?, bias_of("selection_bias", selection_bias)?);
    let chosen = match (table, token_ids) {
        (Some(table), Some(tokens)) => Some(look_up(&spec, rows, &table, &tokens)?),
        _ => None,
    };

    let floats = x.floats()?;
    let biases = Biases { logit: logit_bias.as_deref(), selection: selection_bias.as_deref() };
    let weight = weight.as_ref().map(|weight| &weight.0);
    let routed = py.detach(|| {
        let mut logits = vec![0.0; rows * num_experts];
        match weight {
            Some(matrix) => {
                product(floats, width, &mut [Target { matrix, bias: None, out: FloatsMut::F32(&mut logits) }]);
            }
            None => floats.widen(&mut logits),
        }
        let (mut ids, mut weights) = (vec![0; rows * top_k], vec![0.0; rows * top_k]);
        let pool = threads(logits.len() <= LOGITS_ALONE);
        let choice = chosen.as_deref().map_or(Choice::Best, Choice::Given);
        spec.select(pool, &mut logits, biases, choice, &mut ids, &mut weights)?;
        let mass: Vec<f32> = spec.selected_mass(&logits, &ids).collect();
        Ok((ids.into_iter().map(i64::from).collect(), weights, mass))
    });
    let (ids, weights, mass): (Vec<i64>, _, _) = routed.map_err(|error: farthing::error::Error| exception(error))?;
    let shape = [rows, top_k];
    let (ids, weights) = (PyArray1::from_vec(py, ids), PyArray1::from_vec(py, weights));
    Ok((ids.reshape(shape)?, weights.reshape(shape)?, PyArray1::from_vec(py, mass)))
}

/// The rows of `table`: (vocabulary, k) for `tokens`: (t,).
fn look_up(
    spec: &Spec,
    rows: usize,
    table: &PyReadonlyArray2<'_, i64>,
    tokens: &PyReadonlyArray1<'_, i64>,
) -> PyResult<Vec<u32>> {
    let (table, tokens) = (table.as_array(), tokens.as_array());
    if table.ncols() != spec.top_k {
        let (got, expected) = (tuple(table.shape()), spec.top_k);
        return Err(PyValueError::new_err(format!("table: got shape {got}, expected (V, {expected})")));
    }
    if tokens.len() != rows {
        let got = tokens.len();
        return Err(PyValueError::new_err(format!("token_ids: got {got}, expected {rows}, one for each row of x")));
    }
    let mut chosen = Vec::with_capacity(rows * spec.top_k);
    for &token in tokens {
        let Some(at) = usize::try_from(token).ok().filter(|at| *at < table.nrows()) else {
            let expected = table.nrows();
            return Err(PyValueError::new_err(format!(
                "token_ids: got {token}, expected 0 or above, below the {expected} rows of the table"
            )));
        };
        for &id in table.row(at) {
            let Some(id) = u32::try_from(id).ok().filter(|id| (*id as usize) < spec.experts) else {
                let expected = spec.experts;
                return Err(PyValueError::new_err(format!(
                    "table: got expert {id} for token {token}, expected 0 or above, below {expected}"
                )));
            };
            chosen.push(id);
        }
    }
    Ok(chosen)
}

/// Counts over any number of routed rows.
#[pyclass(module = "farthing._core")]
pub(crate) struct RoutingStatistics(Counts);

#[pymethods]
impl RoutingStatistics {
    #[new]
    fn new(num_experts: usize) -> PyResult<RoutingStatistics> {
        if !(1..=1 << 24).contains(&num_experts) {
            return Err(PyValueError::new_err(format!("num_experts: got {num_experts}, expected 1 to {}", 1 << 24)));
        }
        Ok(RoutingStatistics(Counts::new(num_experts)))
    }

    /// Adds the rows of `ids`: (t, k), with their shares of all scores, `(t,)` or none.
    fn record(&mut self, ids: PyReadonlyArrayDyn<'_, i64>, mass: Option<PyReadonlyArray1<'_, f32>>) -> PyResult<()> {
        let &[rows, _] = ids.shape() else {
            return Err(PyValueError::new_err(format!("ids: got shape {}, expected (T, K)", tuple(ids.shape()))));
        };
        if let Some(mass) = &mass
            && mass.shape() != [rows]
        {
            let got = tuple(mass.shape());
            return Err(PyValueError::new_err(format!("selected_mass: got shape {got}, expected ({rows},)")));
        }
        let mass = mass.map(|mass| mass.as_array().to_vec()).unwrap_or_default();
        self.0.record(ids.as_array().iter().copied(), rows as u64, mass);
        Ok(())
    }

    /// Rows that each expert got.
    #[getter]
    fn tokens_per_expert<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        PyArray1::from_slice(py, self.0.loads())
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.0.rows()
    }

    #[getter]
    fn skipped(&self) -> u64 {
        self.0.skipped()
    }

    #[getter]
    fn distinct(&self) -> usize {
        self.0.distinct()
    }

    #[getter]
    fn entropy(&self) -> f64 {
        self.0.entropy()
    }

    #[getter]
    fn max_over_mean(&self) -> f64 {
        self.0.max_over_mean()
    }

    #[getter]
    fn coefficient_of_variation(&self) -> f64 {
        self.0.coefficient_of_variation()
    }

    #[getter]
    fn mean_mass(&self) -> f64 {
        self.0.mean_mass()
    }
}
