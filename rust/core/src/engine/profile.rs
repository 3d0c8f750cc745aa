//! What a step costs by its number of rows, measured once for a model, a machine and a number of threads.

use super::cache::{Cache, Table};
use crate::checksum::checksum;
use crate::error::Error;
use crate::model::{Batch, Model, Row, Scratch};
use crate::speculative::controller::PassCost;
use farthing_kernels::attention::Span;
use farthing_kernels::cost::CostCurve;
use farthing_kernels::pool::Pool;

/// Most rows that are measured; more cost in proportion.
const MOST: usize = 16;
/// Tokens of context of the second curve.
const CONTEXT: usize = 1024;

/// `V(rows)` of a whole step, with and without a long context.
#[derive(Clone, Debug, Default)]
pub(super) struct StepCost {
    short: CostCurve,
    /// And how long it is.
    long: Option<(usize, CostCurve)>,
}

impl StepCost {
    /// Measures steps of `model`, or takes what an earlier measurement left in the cache directory.
    pub(super) fn measure(
        model: &mut Model,
        cache: &mut Cache,
        pool: &Pool,
        scratch: &mut Scratch,
        context: usize,
    ) -> Result<StepCost, Error> {
        let shape = format!("{:?} {:?}", model.config(), model.explain());
        let name = format!("step of model {:016x}", checksum(shape.as_bytes()));
        let mut curve = |start: usize| {
            let mut table = Table::default();
            if !cache.reserve(&mut table, start + MOST) {
                return Ok(None);
            }
            let run = |rows: usize| step(model, cache, pool, scratch, &table, start, rows);
            let curve = CostCurve::cached_work(pool, &format!("{name} after {start}"), MOST, run);
            cache.truncate(&mut table, 0);
            Ok::<_, Error>(Some(curve?))
        };
        let short = if context >= MOST { curve(0)? } else { None };
        let long = if context >= CONTEXT + MOST { curve(CONTEXT)? } else { None };
        Ok(StepCost { short: short.unwrap_or_default(), long: long.map(|curve| (CONTEXT, curve)) })
    }

    /// The cost after `context` tokens.
    pub(super) fn at(&self, context: usize) -> AtContext<'_> {
        let share = self.long.as_ref().map_or(0.0, |(long, _)| (context as f64 / *long as f64).min(1.0));
        AtContext { cost: self, share }
    }
}

/// [`StepCost`] at one length of context.
pub(super) struct AtContext<'a> {
    cost: &'a StepCost,
    /// How far towards the long curve.
    share: f64,
}

impl PassCost for AtContext<'_> {
    fn of(&self, rows: usize) -> f64 {
        let short = self.cost.short.at(rows);
        self.cost.long.as_ref().map_or(short, |(_, long)| short + self.share * (long.at(rows) - short))
    }
}

/// One step over `rows` rows behind `start` others, whose keys are whatever the pages hold.
fn step(
    model: &mut Model,
    cache: &mut Cache,
    pool: &Pool,
    scratch: &mut Scratch,
    table: &Table,
    start: usize,
    rows: usize,
) -> Result<(), Error> {
    let vocab = model.config().vocab;
    // Tokens apart from each other, so that a mixture's rows go to experts of their own.
    let inputs: Vec<Row<'_>> = (0..rows).map(|row| Row::Token((row * 7919 % vocab) as u32)).collect();
    let positions: Vec<u32> = (start..start + rows).map(|position| position as u32).collect();
    let logit_rows: Vec<usize> = (0..rows).collect();
    let spans = [Span { rows, start, pages: table.pages(), ..Span::default() }];
    let slots = [table.slot()];
    let batch = Batch {
        rows: &inputs,
        positions: &positions,
        spans: &spans,
        slots: &slots,
        logit_rows: &logit_rows,
        capture: &[],
    };
    model.forward(pool, &batch, cache, scratch)
}
