//! `farthing.reasoning.effort`: how a model is told how much to think.

use farthing::error::Error;
use farthing::load::ChatTemplate;
use farthing::reasoning::{self, Effort, Limits, Placement};
use pyo3::prelude::*;

use crate::errors::exception;

/// How a model family is told how much to think.
#[pyclass(frozen, module = "farthing._core")]
pub(crate) struct Dialect(pub(crate) reasoning::Dialect);

#[pymethods]
impl Dialect {
    /// Reads a chat template.
    #[new]
    #[pyo3(signature = (template, *, bos_token, eos_token))]
    fn new(py: Python<'_>, template: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> PyResult<Self> {
        let read = || {
            let template = ChatTemplate::new(template)?;
            Ok(Dialect(reasoning::Dialect::of(&template, bos_token, eos_token)))
        };
        py.detach(read).map_err(|error: farthing::load::TemplateError| exception(Error::Format(error.into())))
    }

    /// A family whose levels are known from elsewhere.
    #[staticmethod]
    #[pyo3(signature = (family, variable, levels))]
    fn of_levels(family: &str, variable: &str, levels: Vec<String>) -> PyResult<Self> {
        let levels: Result<Vec<_>, _> = levels.iter().map(|level| Effort::parse(level)).collect();
        Ok(Dialect(reasoning::Dialect::of_levels(family, variable, &levels.map_err(exception)?)))
    }

    /// The same, of a model that thinks or does not, whatever its template shows.
    fn assume(&self, thinks: bool) -> Self {
        Dialect(reasoning::Dialect { assumed: Some(thinks), ..self.0.clone() })
    }

    #[getter]
    fn family(&self) -> &str {
        &self.0.family
    }

    #[getter]
    fn levels(&self) -> Vec<&'static str> {
        self.0.levels.values.iter().map(|(level, _)| level.name()).collect()
    }

    #[getter]
    fn variables(&self) -> Vec<&str> {
        let switch = self.0.switch.as_ref().map(|switch| switch.variable.as_str());
        let levels = (!self.0.levels.is_empty()).then_some(self.0.levels.variable.as_str());
        levels.into_iter().chain(switch).chain(self.0.budget.as_deref()).collect()
    }

    #[getter]
    fn markers(&self) -> Option<(&'static str, &'static str)> {
        self.0.markers
    }

    #[getter]
    fn thinks(&self) -> bool {
        self.0.thinks()
    }

    #[pyo3(signature = (effort, *, tokens, answer_reserve, budget, strict))]
    fn plan(
        &self,
        effort: &str,
        tokens: Option<usize>,
        answer_reserve: Option<usize>,
        budget: Option<usize>,
        strict: bool,
    ) -> PyResult<EffortPlan> {
        let effort = Effort::parse(effort).map_err(exception)?;
        let plan = self.0.plan(effort, &Limits { tokens, answer_reserve, budget }, strict).map_err(exception)?;
        let placement = match self.0.placement {
            Placement::System => "system",
            Placement::User => "user",
        };
        Ok(EffortPlan {
            level: plan.level.map(Effort::name),
            template_kwargs: serde_json::Value::Object(plan.template_kwargs).to_string(),
            system_suffix: plan.suffix,
            placement,
            budget: plan.budget,
            warnings: plan.warnings,
            summary: plan.summary,
        })
    }
}

/// How a request is honoured; the variables of the template as JSON.
#[pyclass(frozen, get_all, module = "farthing._core")]
pub(crate) struct EffortPlan {
    level: Option<&'static str>,
    template_kwargs: String,
    system_suffix: Option<&'static str>,
    placement: &'static str,
    budget: Option<usize>,
    warnings: Vec<String>,
    summary: String,
}
