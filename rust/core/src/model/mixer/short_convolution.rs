//! The gated short convolution of LFM2 (arXiv 2511.23404): `output(c · convolution(b · u))` for `(b, c, u) = input(x)`,
//! over a few rows and without an activation.

use super::super::forward::{Pass, Stream, sized};
use super::super::names::{Part, Role};
use super::super::weights::{Linear, Loader, MatrixSpec};
use crate::error::Error;
use farthing_kernels::matmul::matmul;
use farthing_kernels::recurrent::{Columns, Convolution, States, multiply};

/// A short convolution's description.
#[derive(Clone, Debug, PartialEq)]
pub struct ShortConvolutionSpec {
    /// Channels: the width of the stream.
    pub channels: usize,
    /// Rows that an output is made of, its own included.
    pub taps: usize,
    /// Biases on input, convolution and output.
    pub bias: bool,
}

/// A short convolution's tensors.
#[derive(Debug)]
pub(in crate::model) struct ShortConvolution {
    channels: usize,
    input: Linear,
    convolution: Convolution,
    output: Linear,
}

/// Buffers of the forward pass.
#[derive(Default)]
pub(super) struct Buffers {
    /// `(t, 3 * channels)`: b, c and u.
    projected: Vec<f32>,
    /// `(t, channels)`.
    gated: Vec<f32>,
    convolved: Vec<f32>,
}

impl ShortConvolutionSpec {
    pub(super) fn state_floats(&self) -> usize {
        (self.taps - 1) * self.channels
    }

    pub(super) fn matrices(&self) -> [MatrixSpec; 2] {
        [
            MatrixSpec::new(Role::ConvolutionInput, 3 * self.channels, self.channels).biased(self.bias),
            MatrixSpec::new(Role::ConvolutionOutput, self.channels, self.channels).biased(self.bias),
        ]
    }

    pub(super) fn load(&self, loader: &Loader<'_>, layer: usize) -> Result<ShortConvolution, Error> {
        let [input, output] = self.matrices();
        let weight = loader.taps(Part::Convolution, layer, self.channels, self.taps)?;
        let bias = self.bias.then(|| loader.bias(Part::Convolution, layer, self.channels)).transpose()?;
        Ok(ShortConvolution {
            channels: self.channels,
            input: loader.linear(&input, layer)?,
            convolution: Convolution::new(&weight, bias.as_deref(), self.channels, false),
            output: loader.linear(&output, layer)?,
        })
    }
}

impl ShortConvolution {
    pub(super) fn linears(&self) -> [(Role, &Linear); 2] {
        [(Role::ConvolutionInput, &self.input), (Role::ConvolutionOutput, &self.output)]
    }

    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        states: &mut States,
        stream: &mut Stream,
        buffers: &mut Buffers,
        after: Option<&[f32]>,
    ) {
        let (t, pool, channels) = (pass.rows(), pass.pool, self.channels);
        let projected = sized(&mut buffers.projected, t * 3 * channels);
        pass.prepare(stream, &[&self.input]);
        matmul(pool, &stream.normed, t, &stream.input, &mut [self.input.job(projected, false)]);
        let columns = |index: usize| Columns { x: projected, stride: 3 * channels, offset: index * channels };
        let gated = sized(&mut buffers.gated, t * channels);
        multiply(pool, columns(0), columns(2), gated, channels);
        let convolved = sized(&mut buffers.convolved, t * channels);
        self.convolution.run(pool, gated, pass.segments, states, convolved);
        multiply(pool, columns(1), Columns::all(convolved, channels), gated, channels);
        pass.add(gated, &self.output, after, stream);
    }
}
