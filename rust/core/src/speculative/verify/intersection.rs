//! A drafter with another vocabulary: laws and tokens carried over the tokens that both have.

use std::collections::HashMap;

use crate::error::Error;

/// Which tokens of a drafter's vocabulary are tokens of the target's (token-level intersection, Timor et al. 2025,
/// <https://arxiv.org/abs/2502.05202>).
///
/// The drafter draws from its law restricted to the common tokens; the verifier gets that law in the target's ids. Two
/// tokens of the drafter that are one of the target's (by a normalised space, say) add up there.
///
/// ```
/// use farthing::speculative::verify::Intersection;
/// let common = Intersection::new(["b", "x", "a"], ["a", "b", "c"]);
/// assert_eq!((common.token(0), common.token(1)), (Some(1), None));
/// let mut q = [0.2, 0.5, 0.3f32];
/// common.restrict(&mut q)?;
/// assert_eq!((q, common.scatter(&q)?), ([0.4, 0.0, 0.6], vec![0.6, 0.4, 0.0]));
/// # Ok::<(), farthing::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intersection {
    /// The target's id of each of the drafter's tokens.
    to_target: Vec<Option<u32>>,
    target: usize,
}

impl Intersection {
    /// Tokens whose text, in bytes, is the same; texts by id, empty ones for ids that are no text. Of the target's tokens
    /// with one text the lowest counts.
    pub fn new<T: AsRef<[u8]>>(
        drafter: impl IntoIterator<Item = T>,
        target: impl IntoIterator<Item = T>,
    ) -> Intersection {
        let target: Vec<T> = target.into_iter().collect();
        let mut ids: HashMap<&[u8], u32> = HashMap::with_capacity(target.len());
        for (id, text) in target.iter().enumerate() {
            ids.entry(text.as_ref()).or_insert(id as u32);
        }
        ids.remove(&[][..]);
        let to_target = drafter.into_iter().map(|text| ids.get(text.as_ref()).copied()).collect();
        Intersection { to_target, target: target.len() }
    }

    /// The target's id of a drafter's token.
    pub fn token(&self, token: u32) -> Option<u32> {
        self.to_target.get(token as usize).copied().flatten()
    }

    /// The target's ids of all of the drafter's tokens.
    pub fn tokens(&self) -> &[Option<u32>] {
        &self.to_target
    }

    /// Number of the drafter's tokens that the target has.
    pub fn len(&self) -> usize {
        self.to_target.iter().flatten().count()
    }

    /// Whether there is no common token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Restricts a drafter's law `q`: (drafter's vocabulary,) to the common tokens: what it is to draw from.
    pub fn restrict(&self, q: &mut [f32]) -> Result<(), Error> {
        self.check(q)?;
        for (q, token) in q.iter_mut().zip(&self.to_target) {
            if token.is_none() {
                *q = 0.0;
            }
        }
        let total: f64 = q.iter().map(|&q| f64::from(q)).sum();
        if !(total > 0.0 && total < f64::INFINITY) {
            let got = format!("probability {total} of the common tokens");
            return Err(Error::argument("q", got, "some: without, nothing can be drafted here"));
        }
        for q in q {
            *q = (f64::from(*q) / total) as f32;
        }
        Ok(())
    }

    /// The restricted law in the target's ids, `(target's vocabulary,)`: what the verifier is to be told.
    pub fn scatter(&self, q: &[f32]) -> Result<Vec<f32>, Error> {
        self.check(q)?;
        let mut scattered = vec![0.0; self.target];
        for (token, (&q, to)) in q.iter().zip(&self.to_target).enumerate() {
            match to {
                Some(to) => scattered[*to as usize] += q,
                None if q == 0.0 => {}
                None => {
                    let got = format!("{q} for token {token}, which the target has not");
                    return Err(Error::argument("q", got, "a law restricted to the common tokens"));
                }
            }
        }
        Ok(scattered)
    }

    fn check(&self, q: &[f32]) -> Result<(), Error> {
        if q.len() == self.to_target.len() {
            return Ok(());
        }
        Err(Error::argument("q", q.len(), format!("{}, the drafter's vocabulary", self.to_target.len())))
    }
}
