//! Text that goes round in circles.

/// Longest period that is noticed, in tokens.
const PERIODS: usize = 128;
/// A token that no vocabulary has.
const NOTHING: u32 = u32::MAX;

/// Notices a suffix that has repeated 8 times, or 24 times when its period is below 8 tokens.
///
/// For each period p it knows how many tokens in a row equal the one p before; exact, and the same work for each token.
///
/// ```
/// use farthing::reasoning::LoopGuard;
/// let mut guard = LoopGuard::default();
/// let caught = (0..).position(|index: u32| guard.push(index % 10));
/// assert_eq!(caught, Some(79));
/// ```
#[derive(Clone, Debug)]
pub struct LoopGuard {
    /// The last tokens, twice, so that they always lie in one piece.
    recent: [u32; 2 * PERIODS],
    at: usize,
    /// For each period, the longest first, tokens that equal the one a period before.
    runs: [u16; PERIODS],
}

impl Default for LoopGuard {
    fn default() -> Self {
        LoopGuard { recent: [NOTHING; 2 * PERIODS], at: 0, runs: [0; PERIODS] }
    }
}

/// For each period, the longest first, how many tokens must equal the one a period before.
const NEEDED: [u16; PERIODS] = {
    let mut needed = [0; PERIODS];
    let mut index = 0;
    while index < PERIODS {
        let period = PERIODS - index;
        let repetitions = if period < 8 { 24 } else { 8 };
        needed[index] = (period * (repetitions - 1)) as u16;
        index += 1;
    }
    needed
};

impl LoopGuard {
    /// Takes in a token; whether the text goes round in circles now.
    pub fn push(&mut self, token: u32) -> bool {
        let window = &self.recent[self.at..self.at + PERIODS];
        let mut caught = false;
        for ((run, &needed), &before) in self.runs.iter_mut().zip(&NEEDED).zip(window) {
            *run = if before == token { run.saturating_add(1) } else { 0 };
            caught |= *run >= needed;
        }
        self.recent[self.at] = token;
        self.recent[self.at + PERIODS] = token;
        self.at = (self.at + 1) % PERIODS;
        caught
    }
}
