//! Which instruction set the kernels use: detected once, forced down by `FARTHING_ISA`.
//!
//! Every level computes the same bits; the scalar level is the specification.

use std::sync::OnceLock;

/// Instruction-set level, in ascending order of speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust; the specification of every other level.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// [`Isa::Avx512Vnni`] with VBMI.
    Avx512Vbmi,
}

/// `FARTHING_ISA` names a level this CPU can't run, or no level at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("FARTHING_ISA: got {got:?}, expected one of {expected}")]
pub struct IsaError {
    /// The value of the variable.
    pub got: String,
    /// The names this CPU accepts.
    pub expected: String,
}

impl Isa {
    /// Every level, ascending.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni, Isa::Avx512Vbmi];

    /// The name used by `FARTHING_ISA`, `farthing doctor` and the tests.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Vbmi => "avx512vbmi",
        }
    }

    /// Whether this CPU (and the compiled target) can run the level.
    pub fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                    && std::arch::is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => Isa::Avx2.available() && std::arch::is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                Isa::Avx2.available()
                    && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                    && std::arch::is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => Isa::Avx512Vnni.available() && std::arch::is_x86_feature_detected!("avx512vbmi"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni | Isa::Avx512Vbmi => false,
        }
    }

    /// The best level this CPU can run.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rfind(|isa| isa.available()).unwrap_or(Isa::Scalar)
    }

    /// The level that `FARTHING_ISA` asks for; `None` when the variable is unset or empty.
    pub fn requested() -> Result<Option<Isa>, IsaError> {
        let Some(value) = std::env::var_os("FARTHING_ISA").filter(|value| !value.is_empty()) else { return Ok(None) };
        Isa::ALL.into_iter().find(|isa| isa.available() && value == isa.name()).map(Some).ok_or_else(|| {
            let names: Vec<&str> = Isa::ALL.into_iter().filter(|isa| isa.available()).map(Isa::name).collect();
            IsaError { got: value.to_string_lossy().into_owned(), expected: names.join(", ") }
        })
    }

    /// The level in force for this process: requested, else detected. Read once.
    ///
    /// A bad `FARTHING_ISA` falls back to detection here; loading a model reports it as an error first.
    pub fn active() -> Isa {
        static ACTIVE: OnceLock<Isa> = OnceLock::new();
        *ACTIVE.get_or_init(|| Isa::requested().ok().flatten().unwrap_or_else(Isa::detect))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_names_are_distinct() {
        assert!(Isa::Scalar.available());
        assert!(Isa::detect().available());
        let mut names: Vec<_> = Isa::ALL.iter().map(|isa| isa.name()).collect();
        names.dedup();
        assert_eq!(names.len(), Isa::ALL.len());
    }
}
