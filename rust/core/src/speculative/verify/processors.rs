//! Raw logits of a verified pass as the laws that the rules speak of.

use farthing_kernels::sample::{Sampling, TokenCounts, probabilities};

use super::Shape;
use crate::error::Error;

/// Turns `logits`: (rows, width) of a pass over a draft into the laws that plain sampling would have at each row, with the
/// sampler's own processors in its order: penalties, allowed tokens, temperature, min-p, top-k, top-p.
///
/// Each row has its own history: `counts`, which are left as they were, and the drafted tokens on its path. `allowed`
/// says which tokens a row may take, as [`Sampling::allowed`] does, which is not read: a grammar is elsewhere behind each
/// token. `position` of `sampling` is that of the first token.
///
/// ```
/// use farthing::speculative::verify::{Shape, laws};
/// use farthing_kernels::sample::{Sampling, TokenCounts};
/// let sampling = Sampling { presence_penalty: 1000.0, ..Sampling::default() };
/// let mut logits = [0.0; 4];
/// laws(&mut logits, 2, &Shape::chain(&[1]), &sampling, &mut TokenCounts::default(), |_| None)?;
/// // Behind the drafted token that token is penalised.
/// assert_eq!(logits, [0.5, 0.5, 1.0, 0.0]);
/// # Ok::<(), farthing::error::Error>(())
/// ```
///
/// # Panics
/// When the allowed tokens are fewer than a row has.
pub fn laws<'a>(
    logits: &mut [f32],
    width: usize,
    shape: &Shape,
    sampling: &Sampling<'_>,
    counts: &mut TokenCounts,
    allowed: impl Fn(usize) -> Option<&'a [u64]>,
) -> Result<(), Error> {
    if width == 0 || !logits.len().is_multiple_of(width) {
        return Err(Error::argument(
            "logits",
            format!("{} numbers", logits.len()),
            format!("rows of {width}, 1 or more"),
        ));
    }
    shape.check(logits.len() / width, width)?;
    for (row, logits) in logits.chunks_exact_mut(width).enumerate() {
        let path: Vec<u32> = shape.path(row).map(|row| shape.token(row)).collect();
        let position = sampling.position.wrapping_add(path.len() as u64);
        let sampling = Sampling { allowed: allowed(row), position, ..sampling.clone() };
        for &token in &path {
            counts.push(token);
        }
        let processed = probabilities(logits, &sampling, counts);
        for &token in &path {
            counts.remove(token);
        }
        processed.map_err(|error| Error::NoToken { position: position as usize, error })?;
    }
    Ok(())
}
