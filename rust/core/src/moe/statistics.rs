//! How evenly tokens spread over experts: what the cost of a step, and the choice of experts to keep in memory, depend on.

/// Counts over any number of routed rows.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingStatistics {
    loads: Vec<u64>,
    rows: u64,
    skipped: u64,
    mass: f64,
    masses: u64,
}

impl RoutingStatistics {
    /// Nothing routed yet, for `experts` experts.
    ///
    /// ```
    /// let mut statistics = farthing::moe::RoutingStatistics::new(4);
    /// statistics.record([0, 1, 1, 2], 2, [0.5, 0.75]);
    /// assert_eq!(statistics.loads(), [1, 2, 1, 0]);
    /// assert_eq!((statistics.distinct(), statistics.max_over_mean(), statistics.mean_mass()), (3, 2.0, 0.625));
    /// ```
    pub fn new(experts: usize) -> RoutingStatistics {
        RoutingStatistics { loads: vec![0; experts], rows: 0, skipped: 0, mass: 0.0, masses: 0 }
    }

    /// Counts the experts of `rows` more rows, and the shares of all scores that rows' experts had. An id that is no
    /// expert (expert parallelism marks slots of other machines so) is counted as skipped.
    pub fn record(&mut self, ids: impl IntoIterator<Item = i64>, rows: u64, mass: impl IntoIterator<Item = f32>) {
        for id in ids {
            match usize::try_from(id).ok().and_then(|id| self.loads.get_mut(id)) {
                Some(load) => *load += 1,
                None => self.skipped += 1,
            }
        }
        self.rows += rows;
        for mass in mass {
            self.mass += f64::from(mass);
            self.masses += 1;
        }
    }

    /// (e,) rows that each expert got.
    pub fn loads(&self) -> &[u64] {
        &self.loads
    }

    /// Rows recorded.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Ids that were no expert.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Experts that got any row.
    pub fn distinct(&self) -> usize {
        self.loads.iter().filter(|load| **load > 0).count()
    }

    fn mean(&self) -> f64 {
        self.loads.iter().sum::<u64>() as f64 / self.loads.len() as f64
    }

    /// Entropy of the loads in nats; `ln e` when all experts get as much, 0 when one gets everything, or nothing came.
    pub fn entropy(&self) -> f64 {
        let total = self.loads.iter().sum::<u64>() as f64;
        let shares = self.loads.iter().filter(|load| **load > 0).map(|load| *load as f64 / total);
        shares.map(|share| -share * share.ln()).sum::<f64>().max(0.0)
    }

    /// The greatest load over the mean one; 1 when all are equal, 0 when nothing came.
    pub fn max_over_mean(&self) -> f64 {
        let greatest = self.loads.iter().max().map_or(0, |load| *load);
        if greatest == 0 { 0.0 } else { greatest as f64 / self.mean() }
    }

    /// Standard deviation of the loads over their mean; 0 when all are equal, or nothing came.
    pub fn coefficient_of_variation(&self) -> f64 {
        if self.distinct() == 0 {
            return 0.0;
        }
        let mean = self.mean();
        let squares: f64 = self.loads.iter().map(|load| (*load as f64 - mean).powi(2)).sum();
        (squares / self.loads.len() as f64).sqrt() / mean
    }

    /// Mean share of all experts' scores that the chosen ones had, over the rows that came with it; 0 without any.
    pub fn mean_mass(&self) -> f64 {
        if self.masses == 0 { 0.0 } else { self.mass / self.masses as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_loads_are_even() {
        let mut statistics = RoutingStatistics::new(8);
        statistics.record((0..8).chain(0..8), 8, [0.25; 8]);
        assert!((statistics.entropy() - 8f64.ln()).abs() < 1e-12);
        assert_eq!((statistics.max_over_mean(), statistics.coefficient_of_variation()), (1.0, 0.0));
        assert_eq!((statistics.distinct(), statistics.rows(), statistics.mean_mass()), (8, 8, 0.25));
    }

    #[test]
    fn one_expert_takes_everything() {
        let mut statistics = RoutingStatistics::new(4);
        statistics.record([2; 10], 10, [1.0; 10]);
        assert_eq!((statistics.entropy(), statistics.max_over_mean(), statistics.distinct()), (0.0, 4.0, 1));
        assert!((statistics.coefficient_of_variation() - 3f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn ids_of_no_expert_are_skipped() {
        let mut statistics = RoutingStatistics::new(2);
        statistics.record([-1, 0, 2, i64::MAX, i64::MIN, 1], 3, []);
        assert_eq!((statistics.loads(), statistics.skipped()), (&[1, 1][..], 4));
    }

    #[test]
    fn nothing_is_zero() {
        let empty = RoutingStatistics::new(3);
        let numbers = [empty.entropy(), empty.max_over_mean(), empty.coefficient_of_variation(), empty.mean_mass()];
        assert_eq!((numbers, empty.distinct()), ([0.0; 4], 0));
    }
}
