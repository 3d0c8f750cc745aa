//! A known-answer test of every kernel family at the first use of a level; a level that fails gives way to the next lower.

use std::convert::Infallible;
use std::sync::OnceLock;

use super::{Input, Job, matmul};
use crate::format::{Bits, FloatType, Format, Offset, PackedMatrix, Packing, Precision, SuperBlock, Table};
use crate::isa::Isa;
use crate::pool::Pool;

/// A kernel whose result differs from the specification.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("self-test of {kernel}: got {got}, expected {expected}")]
pub struct SelfTestError {
    /// Level, format and precision.
    pub kernel: String,
    /// The first wrong output.
    pub got: f32,
    /// What the scalar kernel gives.
    pub expected: f32,
}

/// The outcome of one kernel's self-test on this CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelfTest {
    /// Format and precision.
    pub name: String,
    /// Level.
    pub isa: Isa,
    /// Whether its result equals the specification bit for bit.
    pub passed: bool,
}

/// Compares every kernel family of `isa` with the scalar one; run once for each level, then remembered.
pub fn self_test(isa: Isa) -> Result<(), SelfTestError> {
    static RESULTS: [OnceLock<Result<(), SelfTestError>>; Isa::ALL.len()] = [const { OnceLock::new() }; Isa::ALL.len()];
    RESULTS[isa as usize].get_or_init(|| families().iter().try_for_each(|family| family.check(isa))).clone()
}

/// The self-test of every kernel family on every level that this CPU has.
pub fn self_tests() -> Vec<SelfTest> {
    let levels = Isa::ALL.into_iter().filter(|isa| isa.available());
    let tests = levels.flat_map(|isa| families().into_iter().map(move |family| (isa, family)));
    tests.map(|(isa, family)| SelfTest { name: family.name(), isa, passed: family.check(isa).is_ok() }).collect()
}

/// The level in force, or the best below it that passes its self-test. Scalar needs no test: it is the specification.
pub(crate) fn best() -> Isa {
    static BEST: OnceLock<Isa> = OnceLock::new();
    *BEST.get_or_init(|| {
        let usable = |isa: &Isa| *isa <= Isa::active() && isa.available();
        let levels = Isa::ALL.into_iter().rev().filter(usable);
        levels.into_iter().find(|&isa| isa == Isa::Scalar || self_test(isa).is_ok()).unwrap_or(Isa::Scalar)
    })
}

struct Family {
    format: Format,
    precision: Precision,
}

fn families() -> Vec<Family> {
    let mut families = Vec::new();
    for bits in [Bits::Four, Bits::Eight] {
        for (offset, scale) in [
            (Offset::Symmetric, FloatType::F16),
            (Offset::ZeroPoint, FloatType::Bf16),
            (Offset::Minimum, FloatType::F32),
        ] {
            for precision in [Precision::A8, Precision::A16, Precision::F32] {
                families.push(Family { format: Format::Integer { bits, group: 32, offset, scale }, precision });
            }
        }
    }
    let scale = FloatType::F16;
    let integers = [
        Format::Ternary { packing: Packing::TwoBits, group: Some(32), scale },
        Format::Ternary { packing: Packing::TwoBits, group: None, scale },
        Format::Ternary { packing: Packing::BaseThree, group: None, scale },
        Format::Lookup { table: Table::Mxfp4, group: 32, scale },
        Format::Lookup { table: Table::Nf4, group: 64, scale },
        Format::Lookup { table: Table::Iq4Nl, group: 32, scale },
        Format::Super(SuperBlock::Q4K),
        Format::Super(SuperBlock::Q6K),
    ];
    let quantised = [Precision::A8, Precision::A16];
    families.extend(integers.iter().flat_map(|&format| quantised.map(|precision| Family { format, precision })));
    for kind in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        families.push(Family { format: Format::Float(kind), precision: Precision::F32 });
    }
    families
}

impl Family {
    fn name(&self) -> String {
        match self.format {
            Format::Float(kind) => format!("{kind:?}").to_lowercase(),
            format => format!("{format} {}", self.precision.name()),
        }
    }

    /// `n` rows of codes, or of weights, over their whole ranges.
    fn matrix(&self, n: usize, k: usize) -> PackedMatrix {
        let maximum = match self.format {
            Format::Float(kind) => {
                let row = |n: usize, row: &mut [f32]| {
                    row.iter_mut().enumerate().for_each(|(k, w)| *w = ((n * 37 + k * 101) % 64) as f32 - 31.0);
                    Ok::<(), Infallible>(())
                };
                return PackedMatrix::pack_float(n, k, kind, row).expect("small finite weights");
            }
            Format::Integer { bits, .. } => usize::from(bits.maximum()),
            Format::Lookup { .. } => 15,
            Format::Ternary { .. } => 2,
            Format::Super(kind) => usize::from(kind.maximum()),
        };
        let packed = PackedMatrix::pack_codes(n, k, self.format, self.precision, |n, row| {
            let code = |(k, code): (usize, &mut u8)| *code = ((n * 37 + k * 101) % (maximum + 1)) as u8;
            row.codes.iter_mut().enumerate().for_each(code);
            row.scales.iter_mut().enumerate().for_each(|(g, scale)| *scale = (n + g) as f32 / 64.0 - 0.5);
            row.offsets.iter_mut().enumerate().for_each(|(g, offset)| *offset = ((n + 3 * g) % (maximum + 1)) as f32);
            row.sub_scales.iter_mut().enumerate().for_each(|(sub, scale)| *scale = ((n + 5 * sub) % 64) as i8);
            row.sub_minima.iter_mut().enumerate().for_each(|(sub, minimum)| *minimum = ((n + 7 * sub) % 64) as u8);
            Ok::<(), Infallible>(())
        });
        packed.expect("codes, scales and offsets in range")
    }

    /// 83 rows (a full panel and two tiles, one ragged), 40 inputs (a short last group) or a super-block, 1 and 5 rows of x.
    fn check(&self, isa: Isa) -> Result<(), SelfTestError> {
        const N: usize = 83;
        const M: usize = 5;
        let k = if let Format::Super(_) = self.format { SuperBlock::INPUTS } else { 40 };
        let matrix = self.matrix(N, k);
        let x: Vec<f32> = (0..M * k).map(|i| ((i * 59) % 97) as f32 / 7.0 - 6.0).collect();
        let pool = Pool::new(1);
        for m in [1, M] {
            let product = |isa: Isa| {
                let (mut input, mut out) = (Input::new(), vec![0.0; m * N]);
                input.prepare_with(isa, &pool, &x[..m * k], m, k, &[&matrix]);
                let job = Job { matrix: &matrix, bias: None, add: false, out: &mut out };
                matmul(&pool, &x[..m * k], m, &input, &mut [job]);
                out
            };
            for (got, expected) in product(isa).into_iter().zip(product(Isa::Scalar)) {
                if got.to_bits() != expected.to_bits() {
                    return Err(SelfTestError { kernel: format!("{} {}", isa.name(), self.name()), got, expected });
                }
            }
        }
        Ok(())
    }
}
