//! A fast check against damage, not against malice: about as fast as memory delivers.

/// Odd, so that a multiplication loses nothing: two inputs that differ in one lane never agree there.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// 64 bits that change with every bit of `bytes`.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let mut lanes: [u64; 8] = std::array::from_fn(|lane| lane as u64 + 1);
    let (blocks, rest) = bytes.as_chunks::<64>();
    let mut take = |block: &[u8; 64]| {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            *lane = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(FACTOR).rotate_left(31);
        }
    };
    blocks.iter().for_each(&mut take);
    let mut last = [0; 64];
    last[..rest.len()].copy_from_slice(rest);
    take(&last);
    lanes.iter().fold(bytes.len() as u64, |sum, lane| (sum ^ lane).wrapping_mul(FACTOR).rotate_left(31))
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn every_bit_and_the_length_count() {
        let mut bytes: Vec<u8> = (0..200).map(|i: u8| i.wrapping_mul(37)).collect();
        let sum = checksum(&bytes);
        for bit in 0..8 * bytes.len() {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(checksum(&bytes), sum, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        bytes.push(0);
        assert_ne!(checksum(&bytes), sum);
        bytes.pop();
        bytes.swap(3, 64 + 3);
        assert_ne!(checksum(&bytes), sum);
    }
}
