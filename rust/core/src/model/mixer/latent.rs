//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its absorbed form.
//!
//! A token is remembered as one row: a rotated key that all heads share, and a latent of which every head's keys and
//! values are linear maps. These maps are moved to the other side: queries are brought into the latent space, attention
//! runs over the remembered rows as if they were keys and values of one head, and what it gives is brought back.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Norm, Part, Role};
use super::super::weights::{Linear, Loader, MatrixSpec};
use crate::engine::cache::Cache;
use crate::error::Error;
use crate::load::{FormatError, Rows};
use farthing_kernels::attention::{AttentionShape, attention};
use farthing_kernels::format::{FloatType, Format, PackedMatrix, RowCodes};
use farthing_kernels::math::log;
use farthing_kernels::matmul::{Heads, HeadsMut, Input, matmul, matmul_heads};
use farthing_kernels::norm::rms_norm_in_place;
use farthing_kernels::rope::rotate;

/// Of the norms inside, whatever the configuration says of the others.
const EPSILON: f32 = 1e-6;

/// Latent attention's description.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentAttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Width of what of a head is not rotated.
    pub plain_dim: usize,
    /// Width of what is.
    pub rotated_dim: usize,
    /// Width of a head's values.
    pub value_dim: usize,
    /// Width of the latent of keys and values.
    pub latent: usize,
    /// Width of the latent of queries, if they have one.
    pub query_latent: Option<usize>,
    /// Factor on query-key products.
    pub scale: f32,
    /// Queries at position `p` are multiplied by `1 + factor · ln(1 + ⌊p / every⌋)` (Llama 4, Mistral 4).
    pub temperature: Option<Temperature>,
    /// Index of the rotary embedding.
    pub rope: usize,
    /// Whether files have rotated pairs side by side.
    pub interleaved: bool,
    /// Biases on the maps into the latents, and on the output.
    pub bias: bool,
    /// Whether files hold the maps from the latent in two tensors, those to keys turned (llama.cpp).
    pub split: bool,
}

/// How queries grow with their position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Of the logarithm.
    pub factor: f32,
    /// Positions of a step.
    pub every: usize,
}

/// Latent attention's tensors.
#[derive(Debug)]
pub(in crate::model) struct LatentAttention {
    spec: LatentAttentionSpec,
    /// Into the latent of queries, and its norm.
    query_latent: Option<(Linear, Vec<f32>)>,
    /// `(heads * (plain + rotated), query latent or hidden)`.
    query: Linear,
    /// `(latent + rotated, hidden)`.
    key: Linear,
    latent_norm: Vec<f32>,
    /// For each head `(latent, plain)`.
    key_up: Vec<PackedMatrix>,
    /// For each head `(value, latent)`.
    value_up: Vec<PackedMatrix>,
    /// `(hidden, heads * value)`.
    output: Linear,
}

/// For each head its maps from the latent to keys and to values.
type Ups = (Vec<PackedMatrix>, Vec<PackedMatrix>);

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    input: Input,
    query_latents: Vec<f32>,
    queries: Vec<f32>,
    compressed: Vec<f32>,
    /// `(t, heads * (rotated + latent))`.
    absorbed: Vec<f32>,
    /// `(t, rotated + latent)`: what is remembered.
    rows: Vec<f32>,
    attended: Vec<f32>,
    /// `(t, heads * value)`.
    values: Vec<f32>,
}

impl LatentAttentionSpec {
    /// Width of a remembered row.
    pub(super) fn row(&self) -> usize {
        self.rotated_dim + self.latent
    }

    fn head(&self) -> usize {
        self.plain_dim + self.rotated_dim
    }

    fn queries(&self, hidden: usize) -> MatrixSpec {
        let inputs = self.query_latent.unwrap_or(hidden);
        let stored = if self.query_latent.is_some() { Part::QueryUp } else { Part::Matrix(Role::Query) };
        self.turned(MatrixSpec::new(Role::Query, self.heads * self.head(), inputs).stored_as(stored), self.head())
    }

    fn keys(&self, hidden: usize) -> MatrixSpec {
        let rows = self.latent + self.rotated_dim;
        self.turned(MatrixSpec::new(Role::LatentKey, rows, hidden).biased(self.bias), rows)
    }

    /// Rotated pairs at the end of every `width` rows are put in half-split order.
    fn turned(&self, spec: MatrixSpec, width: usize) -> MatrixSpec {
        if self.interleaved { spec.interleaved_tail(width, self.rotated_dim) } else { spec }
    }

    fn up(&self) -> [usize; 2] {
        [self.heads * (self.plain_dim + self.value_dim), self.latent]
    }

    pub(super) fn matrices(&self, hidden: usize) -> Vec<MatrixSpec> {
        let latent = self.query_latent.map(|width| MatrixSpec::new(Role::LatentQuery, width, hidden).biased(self.bias));
        let part = |role, rows, columns| {
            let spec = MatrixSpec::new(role, rows, columns);
            if self.split {
                spec.part_of(Part::Matrix(role), [self.heads * rows, columns])
            } else {
                spec.part_of(Part::KeyValueUp, self.up())
            }
        };
        let ups = (0..self.heads).flat_map(|_| {
            [part(Role::KeyUp, self.latent, self.plain_dim), part(Role::ValueUp, self.value_dim, self.latent)]
        });
        let output = MatrixSpec::new(Role::AttentionOutput, hidden, self.heads * self.value_dim).biased(self.bias);
        latent.into_iter().chain([self.queries(hidden), self.keys(hidden)]).chain(ups).chain([output]).collect()
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<LatentAttention, Error> {
        let hidden = loader.config.hidden;
        let query_latent = |width| {
            let linear = loader.linear(&MatrixSpec::new(Role::LatentQuery, width, hidden).biased(self.bias), layer)?;
            Ok::<_, Error>((linear, loader.norm(Norm::LatentQuery, layer, width)?))
        };
        let (key_up, value_up) =
            if self.split { self.load_split(loader, layer)? } else { self.load_joined(loader, layer)? };
        let output = MatrixSpec::new(Role::AttentionOutput, hidden, self.heads * self.value_dim).biased(self.bias);
        Ok(LatentAttention {
            spec: self.clone(),
            query_latent: self.query_latent.map(query_latent).transpose()?,
            query: loader.linear(&self.queries(hidden), layer)?,
            key: loader.linear(&self.keys(hidden), layer)?,
            latent_norm: loader.norm(Norm::LatentKey, layer, self.latent)?,
            key_up,
            value_up,
            output: loader.linear(&output, layer)?,
        })
    }

    /// The heads' maps from the latent to keys, `(latent, plain)` each, and to values, `(value, latent)`: two tensors.
    fn load_split(&self, loader: &Loader<'_>, layer: usize) -> Result<Ups, Error> {
        let read = |role, n: usize, k: usize| {
            let name = loader.name(Part::Matrix(role), layer) + ".weight";
            let tensor = loader.checkpoint.require(&name, &[self.heads, n, k])?;
            let format = loader.format(&tensor)?;
            let head = |head| loader.pack(&name, role, (n, k), format, &tensor, |row| head * n + row);
            let packed = (0..self.heads).map(head).collect::<Result<Vec<_>, _>>()?;
            loader.finished(&tensor);
            Ok::<_, Error>(packed)
        };
        Ok((read(Role::KeyUp, self.latent, self.plain_dim)?, read(Role::ValueUp, self.value_dim, self.latent)?))
    }

    /// The same, out of one tensor `(heads * (plain + value), latent)`.
    fn load_joined(&self, loader: &Loader<'_>, layer: usize) -> Result<Ups, Error> {
        let name = loader.name(Part::KeyValueUp, layer) + ".weight";
        let tensor = loader.checkpoint.require(&name, &self.up())?;
        let format = loader.format(&tensor)?;
        // Columns of quantised blocks are no rows of such blocks.
        let stored =
            if matches!(format, Format::Float(_)) || !loader.stored() { format } else { Format::Float(FloatType::F32) };
        let head = self.plain_dim + self.value_dim;
        let pack = |role, (n, k), format, rows: &dyn Rows, first: usize| {
            loader.pack(&name, role, (n, k), format, rows, |row| first + row)
        };
        let (mut key_up, mut value_up) = (Vec::new(), Vec::new());
        for first in (0..self.heads).map(|index| index * head) {
            let columns = Columns::read(&tensor, first, self.plain_dim)?;
            key_up.push(pack(Role::KeyUp, (self.latent, self.plain_dim), stored, &columns, 0)?);
            let shape = (self.value_dim, self.latent);
            value_up.push(pack(Role::ValueUp, shape, format, &tensor, first + self.plain_dim)?);
        }
        loader.finished(&tensor);
        Ok((key_up, value_up))
    }
}

/// The columns of some rows, as rows: `(columns, rows)` floats.
struct Columns {
    rows: usize,
    weights: Vec<f32>,
}

impl Columns {
    fn read(tensor: &impl Rows, first: usize, rows: usize) -> Result<Columns, FormatError> {
        let columns = tensor.columns();
        let (mut weights, mut row) = (vec![0.0; rows * columns], vec![0.0; columns]);
        for i in 0..rows {
            tensor.row(first + i, &mut row)?;
            for (column, &weight) in row.iter().enumerate() {
                weights[column * rows + i] = weight;
            }
        }
        Ok(Columns { rows, weights })
    }
}

impl Rows for Columns {
    fn columns(&self) -> usize {
        self.rows
    }

    fn natural_format(&self) -> Result<Format, FormatError> {
        Ok(Format::Float(FloatType::F32))
    }

    fn exact_format(&self) -> Result<Format, FormatError> {
        self.natural_format()
    }

    fn row(&self, i: usize, out: &mut [f32]) -> Result<(), FormatError> {
        out.copy_from_slice(&self.weights[i * self.rows..][..self.rows]);
        Ok(())
    }

    fn codes(&self, _: usize, _: Format, _: &mut RowCodes) -> Result<(), FormatError> {
        unreachable!("floats have no codes")
    }
}

impl LatentAttention {
    pub(super) fn matrices(&self) -> Vec<(Role, &PackedMatrix)> {
        let latent = self.query_latent.iter().map(|(linear, _)| (Role::LatentQuery, &linear.matrix));
        let ups = self.key_up.iter().zip(&self.value_up);
        let ups = ups.flat_map(|(key, value)| [(Role::KeyUp, key), (Role::ValueUp, value)]);
        let first = [(Role::Query, &self.query.matrix), (Role::LatentKey, &self.key.matrix)];
        latent.chain(first).chain(ups).chain([(Role::AttentionOutput, &self.output.matrix)]).collect()
    }

    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        cache: &mut Cache,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) {
        let (spec, t, pool) = (&self.spec, pass.rows(), pass.pool);
        let (row, head) = (spec.row(), spec.head());
        let Buffers { input, query_latents, queries, compressed, absorbed, rows, attended, values } = buffers;
        let queries = sized(queries, t * spec.heads * head);
        let compressed = sized(compressed, t * row);
        if let Some((linear, norm)) = &self.query_latent {
            let latents = sized(query_latents, t * norm.len());
            pass.prepare(stream, &[linear, &self.key]);
            let mut jobs = [linear.job(latents, false), self.key.job(compressed, false)];
            matmul(pool, &stream.normed, t, &stream.input, &mut jobs);
            pool.rows(latents, norm.len(), |_, rows| rms_norm_in_place(rows, norm, EPSILON));
            input.prepare(pool, latents, t, norm.len(), &[&self.query.matrix]);
            matmul(pool, latents, t, input, &mut [self.query.job(queries, false)]);
        } else {
            pass.prepare(stream, &[&self.query, &self.key]);
            let mut jobs = [self.query.job(queries, false), self.key.job(compressed, false)];
            matmul(pool, &stream.normed, t, &stream.input, &mut jobs);
        }
        // Rotated part first, since it is the beginning of a head that is turned.
        let rows = sized(rows, t * row);
        for (row, compressed) in rows.chunks_exact_mut(row).zip(compressed.chunks_exact(row)) {
            let (rotated, latent) = row.split_at_mut(spec.rotated_dim);
            latent.copy_from_slice(&compressed[..spec.latent]);
            rotated.copy_from_slice(&compressed[spec.latent..]);
            rms_norm_in_place(latent, &self.latent_norm, EPSILON);
        }
        let absorbed = sized(absorbed, t * spec.heads * row);
        let width = spec.heads * row;
        for (out, queries) in absorbed.chunks_exact_mut(row).zip(queries.chunks_exact(head)) {
            out[..spec.rotated_dim].copy_from_slice(&queries[spec.plain_dim..]);
        }
        let x = Heads { rows: queries, offset: 0, width: head };
        let out = HeadsMut { rows: &mut *absorbed, offset: spec.rotated_dim, width: row };
        matmul_heads(pool, &self.key_up, t, x, out);
        let turn = |x: &mut [f32], width: usize, heads: usize| {
            pool.rows(x, width, |first, rows| {
                let positions = &pass.batch.positions[first..first + rows.len() / width];
                rotate(&pass.ropes[spec.rope], rows, width, heads, row, positions);
            });
        };
        turn(absorbed, width, spec.heads);
        turn(rows, row, 1);
        if let Some(temperature) = spec.temperature {
            for (queries, &position) in absorbed.chunks_exact_mut(width).zip(pass.batch.positions) {
                let steps = position as usize / temperature.every;
                let factor = log(1.0 + steps as f32).mul_add(temperature.factor, 1.0);
                if steps > 0 {
                    for query in queries {
                        *query *= factor;
                    }
                }
            }
        }
        cache.write(pool, layer, pass.batch.spans, rows, rows);
        let shape = AttentionShape {
            heads: spec.heads,
            kv_heads: 1,
            head_dim: row,
            scale: spec.scale,
            window: None,
            softcap: None,
            sinks: None,
        };
        let attended = sized(attended, t * width);
        attention(pool, absorbed, pass.batch.spans, cache.pages(layer), &shape, attended);
        let values = sized(values, t * spec.heads * spec.value_dim);
        let x = Heads { rows: attended, offset: spec.rotated_dim, width: row };
        let out = HeadsMut { rows: &mut *values, offset: 0, width: spec.value_dim };
        matmul_heads(pool, &self.value_up, t, x, out);
        pass.add(values, &self.output, after, stream);
    }
}
