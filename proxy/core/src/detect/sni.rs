//! The server name between sidecars: `p<application port>.<service>.<namespace>.outrigger.internal`. Its port selects
//! the application port where there is no original destination; the rest is telemetry and selects no policy.

/// What the name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target<'a> {
    /// Application port
    pub port: u16,
    /// Service
    pub service: &'a str,
    /// Namespace
    pub namespace: &'a str,
}

const SUFFIX: &str = ".outrigger.internal";

/// Whether a name belongs to the mesh, readable or not.
pub fn is_mesh(name: &str) -> bool {
    name.len() > SUFFIX.len() && name.is_char_boundary(name.len() - SUFFIX.len()) && {
        name[name.len() - SUFFIX.len()..].eq_ignore_ascii_case(SUFFIX)
    }
}

/// Writes the name.
pub fn format(target: &Target<'_>) -> String {
    format!("p{}.{}.{}{SUFFIX}", target.port, target.service, target.namespace)
}

/// Reads a name that [`format`] wrote.
pub fn parse(name: &str) -> Option<Target<'_>> {
    let rest = is_mesh(name).then(|| &name[..name.len() - SUFFIX.len()])?;
    let (port, rest) = rest.strip_prefix(['p', 'P'])?.split_once('.')?;
    let (service, namespace) = rest.split_once('.')?;
    let digits = port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0');
    let label = |text: &str| !text.is_empty() && !text.contains('.');
    let port = digits.then(|| port.parse().ok())??;
    (label(service) && label(namespace)).then_some(Target { port, service, namespace })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_as_written() {
        let target = Target { port: 9080, service: "reviews", namespace: "demo" };
        let name = format(&target);
        assert_eq!(name, "p9080.reviews.demo.outrigger.internal");
        assert_eq!(parse(&name), Some(target));
        assert!(is_mesh("P1.x.y.Outrigger.Internal"));
    }

    #[test]
    fn refuses_other_names() {
        for name in [
            "",
            ".outrigger.internal",
            "outrigger.internal",
            "reviews.demo.outrigger.internal",
            "p0.reviews.demo.outrigger.internal",
            "p+80.reviews.demo.outrigger.internal",
            "p99999.reviews.demo.outrigger.internal",
            "p80.reviews.outrigger.internal",
            "p80.a.b.c.outrigger.internal",
            "p80..demo.outrigger.internal",
            "p80.reviews.demo.outrigger.internal.example.com",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
        assert!(!is_mesh("example.com"));
    }
}
