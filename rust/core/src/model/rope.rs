//! Rotary frequencies: default, linear, llama3 and `YaRN` (arXiv 2309.00071), as `rope_parameters` or the older
//! `rope_theta` and `rope_scaling` state them.

use super::config::Reader;
use crate::error::Error;
use std::f64::consts::PI;

/// One rotary embedding: angle of pair `i` at position `p` is `p * inverse_frequencies[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// `(rotated / 2,)`.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosines and sines.
    pub scale: f32,
}

/// Reads the rotary embedding of a kind of layer (`""` when all layers share one).
pub(super) fn read(
    reader: &Reader<'_>,
    kind: &str,
    head_dim: usize,
    context: usize,
    default_base: f64,
) -> Result<RopeSpec, Error> {
    read_turned(reader, kind, head_dim, None, 1.0, context, default_base)
}

/// Reads the rotary embedding of the `turned` numbers of a head, whatever share of the head the configuration states.
pub(super) fn read_whole(reader: &Reader<'_>, turned: usize, context: usize, base: f64) -> Result<RopeSpec, Error> {
    read_turned(reader, "", turned, Some(1.0), 1.0, context, base)
}

/// [`read`] for families that turn `share` of a head unless told otherwise.
pub(super) fn read_partial(
    reader: &Reader<'_>,
    head_dim: usize,
    share: f64,
    context: usize,
    base: f64,
) -> Result<RopeSpec, Error> {
    read_turned(reader, "", head_dim, None, share, context, base)
}

fn read_turned(
    reader: &Reader<'_>,
    kind: &str,
    head_dim: usize,
    share: Option<f64>,
    default_share: f64,
    context: usize,
    default_base: f64,
) -> Result<RopeSpec, Error> {
    let stated_share = reader.positive("partial_rotary_factor", Some(default_share))?;
    let parameters = match reader.object("rope_parameters")? {
        Some(parameters) if !kind.is_empty() => match parameters.object(kind)? {
            Some(of_kind) => Some(of_kind),
            None => Some(parameters),
        },
        Some(parameters) => Some(parameters),
        // Local layers have a base of their own and no scaling.
        None if kind == "sliding_attention" => None,
        None => reader.object("rope_scaling")?,
    };
    let base_key = if kind == "sliding_attention" { "rope_local_base_freq" } else { "rope_theta" };
    let stated = reader.positive(base_key, Some(default_base))?;
    let Some(parameters) = parameters else { return Ok(default(head_dim, share.unwrap_or(stated_share), stated)) };
    let base = parameters.positive("rope_theta", Some(stated))?;
    let partial = share.map_or_else(|| parameters.positive("partial_rotary_factor", Some(stated_share)), Ok)?;
    let plain = default(head_dim, partial, base);
    let legacy = parameters.string("type", Some("default"))?;
    match parameters.string("rope_type", Some(&legacy))?.as_str() {
        "default" => Ok(plain),
        "linear" => {
            let factor = parameters.positive("factor", None)? as f32;
            Ok(RopeSpec {
                inverse_frequencies: plain.inverse_frequencies.iter().map(|inv| inv / factor).collect(),
                scale: 1.0,
            })
        }
        "llama3" => llama3(&parameters, plain),
        "yarn" => yarn(&parameters, plain, base, context),
        other => Err(Error::unsupported(
            format!("rope_type {other:?}"),
            "the rotary embeddings default, linear, llama3 and yarn work",
        )),
    }
}

fn default(head_dim: usize, partial: f64, base: f64) -> RopeSpec {
    let rotated = ((head_dim as f64 * partial) as usize).clamp(2, head_dim) / 2 * 2;
    let inverse = |pair: usize| 1.0 / (base.powf(f64::from((2 * pair) as f32 / rotated as f32)) as f32);
    RopeSpec { inverse_frequencies: (0..rotated / 2).map(inverse).collect(), scale: 1.0 }
}

/// Wavelengths above `original / low` are stretched by the factor, those below `original / high` kept, the rest blended.
fn llama3(parameters: &Reader<'_>, plain: RopeSpec) -> Result<RopeSpec, Error> {
    let factor = parameters.positive("factor", None)?;
    let low = parameters.positive("low_freq_factor", Some(1.0))?;
    let high = parameters.positive("high_freq_factor", Some(4.0))?;
    let original = parameters.positive("original_max_position_embeddings", Some(8192.0))?;
    let stretch = |&inverse: &f32| {
        let inverse = f64::from(inverse);
        let wavelength = 2.0 * PI / inverse;
        let blend = (original / wavelength - low) / (high - low);
        let stretched = if wavelength > original / low {
            inverse / factor
        } else if wavelength < original / high {
            inverse
        } else {
            (1.0 - blend) * inverse / factor + blend * inverse
        };
        stretched as f32
    };
    Ok(RopeSpec { inverse_frequencies: plain.inverse_frequencies.iter().map(stretch).collect(), scale: 1.0 })
}

fn yarn(parameters: &Reader<'_>, plain: RopeSpec, base: f64, context: usize) -> Result<RopeSpec, Error> {
    let pairs = plain.inverse_frequencies.len();
    let rotated = 2.0 * pairs as f64;
    let original = parameters.positive("original_max_position_embeddings", Some(context as f64))?;
    let factor = parameters.positive("factor", Some(context as f64 / original))?;
    let correction = |rotations: f64| rotated * (original / (rotations * 2.0 * PI)).ln() / (2.0 * base.ln());
    let mut low = correction(parameters.positive("beta_fast", Some(32.0))?);
    let mut high = correction(parameters.positive("beta_slow", Some(1.0))?);
    if parameters.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(rotated - 1.0));
    if low == high {
        high += 0.001;
    }
    // In f32 throughout, operation for operation as transformers computes it.
    let stretch = |(pair, &inverse): (usize, &f32)| {
        let power = base.powf(f64::from((2 * pair) as f32 / rotated as f32)) as f32;
        let kept = 1.0 - ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        1.0 / (factor as f32 * power) * (1.0 - kept) + inverse * kept
    };
    let magnitude = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let all = parameters.optional_positive("mscale_all_dim")?;
    let scale = match (parameters.optional_positive("attention_factor")?, parameters.optional_positive("mscale")?, all)
    {
        (Some(given), _, _) => given,
        (None, Some(weight), Some(all)) => magnitude(weight) / magnitude(all),
        _ => magnitude(1.0),
    };
    Ok(RopeSpec {
        inverse_frequencies: plain.inverse_frequencies.iter().enumerate().map(stretch).collect(),
        scale: scale as f32,
    })
}

impl RopeSpec {
    /// Divides each frequency by a factor of its own, as GGUF files of Llama 3 store their scaling.
    pub fn divide(&mut self, factors: &[f32]) {
        for (inverse, factor) in self.inverse_frequencies.iter_mut().zip(factors) {
            *inverse /= factor;
        }
    }
}
