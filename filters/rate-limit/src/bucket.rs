//! The bucket: no host call here.

/// Tokens at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Bucket {
    tokens: f64,
    /// Seconds since 1970
    at: f64,
}

impl Bucket {
    pub(crate) fn full(burst: f64, now: f64) -> Self {
        Self { tokens: burst, at: now }
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let (tokens, at) = bytes.split_at_checked(8)?;
        Some(Self { tokens: f64::from_le_bytes(tokens.try_into().ok()?), at: f64::from_le_bytes(at.try_into().ok()?) })
    }

    pub(crate) fn write(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[8..].copy_from_slice(&self.at.to_le_bytes());
        bytes
    }

    /// Takes a token.
    ///
    /// # Errors
    /// There is none; seconds until there is.
    pub(crate) fn draw(&mut self, rate: f64, burst: f64, now: f64) -> Result<(), f64> {
        // The clock may be set back.
        let passed = (now - self.at).max(0.0);
        self.tokens = (self.tokens + passed * rate).min(burst);
        self.at = now;
        if self.tokens < 1.0 {
            return Err((1.0 - self.tokens) / rate);
        }
        self.tokens -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = Bucket::full(2.0, 100.0);
        assert_eq!(bucket.draw(0.5, 2.0, 100.0), Ok(()));
        assert_eq!(bucket.draw(0.5, 2.0, 100.0), Ok(()));
        assert_eq!(bucket.draw(0.5, 2.0, 100.0), Err(2.0));
        assert_eq!(bucket.draw(0.5, 2.0, 102.0), Ok(()));
        assert!(bucket.draw(0.5, 2.0, 102.0).is_err());
        assert_eq!(Bucket::read(&bucket.write()), Some(bucket));
        assert_eq!(Bucket::read(&[0; 15]), None);
    }

    #[test]
    fn a_clock_set_back_costs_nothing() {
        let mut bucket = Bucket::full(1.0, 100.0);
        assert_eq!(bucket.draw(1.0, 1.0, 50.0), Ok(()));
        assert!(bucket.draw(1.0, 1.0, 50.0).is_err());
    }
}
