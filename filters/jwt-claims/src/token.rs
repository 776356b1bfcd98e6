//! Tokens and claims: no host call here.

use std::collections::BTreeMap;
use std::str::FromStr;

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Written {
    jwks: JwkSet,
    issuer: Option<String>,
    audience: Option<String>,
    /// Header by claim; a dot goes into an object
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    required: bool,
}

/// Verifies tokens as configured.
pub(crate) struct Verifier {
    keys: Vec<Key>,
    /// Header and claim
    pub(crate) headers: Vec<(String, String)>,
    /// Requests without a token are refused.
    pub(crate) required: bool,
}

struct Key {
    id: Option<String>,
    key: DecodingKey,
    validation: Validation,
}

impl Verifier {
    /// # Errors
    /// What cannot be used.
    pub(crate) fn new(written: Written) -> Result<Self, String> {
        let mut keys = Vec::new();
        for jwk in &written.jwks.keys {
            let id = jwk.common.key_id.clone();
            let name = id.as_deref().unwrap_or("without kid");
            let named = jwk.common.key_algorithm.ok_or_else(|| format!("jwks: key {name}: alg is missing"))?;
            let algorithm = Algorithm::from_str(&named.to_string());
            let algorithm = algorithm.map_err(|_| format!("jwks: key {name}: alg {named} does not verify tokens"))?;
            let key = DecodingKey::from_jwk(jwk).map_err(|error| format!("jwks: key {name}: {error}"))?;
            let mut validation = Validation::new(algorithm);
            validation.validate_nbf = true;
            // Without the latter a token that lacks the claim would pass.
            match &written.audience {
                Some(audience) => {
                    validation.set_audience(&[audience]);
                    validation.required_spec_claims.insert("aud".to_owned());
                }
                None => validation.validate_aud = false,
            }
            if let Some(issuer) = &written.issuer {
                validation.set_issuer(&[issuer]);
                validation.required_spec_claims.insert("iss".to_owned());
            }
            keys.push(Key { id, key, validation });
        }
        if keys.is_empty() {
            return Err("jwks: there are no keys".into());
        }
        Ok(Self { keys, headers: written.headers.into_iter().collect(), required: written.required })
    }

    /// The claims of a valid token.
    ///
    /// # Errors
    /// Why it is not valid.
    pub(crate) fn verify(&self, token: &str) -> Result<Value, String> {
        let header = decode_header(token).map_err(|error| error.to_string())?;
        let meant = |key: &&Key| header.kid.is_none() || key.id == header.kid;
        let mut why = "no key has its kid".to_owned();
        for key in self.keys.iter().filter(meant) {
            match decode(token, &key.key, &key.validation) {
                Ok(token) => return Ok(token.claims),
                Err(error) => why = error.to_string(),
            }
        }
        Err(why)
    }
}

/// The token of an `Authorization` header (RFC 6750 section 2.1).
pub(crate) fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// A claim as a header's value: lists are joined by commas, objects have none.
pub(crate) fn claim(claims: &Value, path: &str) -> Option<String> {
    let found = path.split('.').try_fold(claims, |value, name| value.get(name))?;
    match found {
        Value::Array(items) => Some(items.iter().filter_map(text).collect::<Vec<_>>().join(",")),
        other => text(other),
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(bool) => Some(bool.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;

    fn verifier() -> Verifier {
        let written = json!({
            // "secret-secret-secret-secret-1234"
            "jwks": {"keys": [{"kty": "oct", "kid": "k1", "alg": "HS256",
                "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTEyMzQ"}]},
            "issuer": "me", "audience": "shop", "headers": {"x-plan": "plan"},
        });
        Verifier::new(serde_json::from_value(written).unwrap()).unwrap()
    }

    fn token(algorithm: Algorithm, claims: Value) -> String {
        let mut header = Header::new(algorithm);
        header.kid = Some("k1".into());
        encode(&header, &claims, &EncodingKey::from_secret(b"secret-secret-secret-secret-1234")).unwrap()
    }

    fn claims(more: Value) -> Value {
        let mut claims = json!({"iss": "me", "aud": "shop", "exp": 4_000_000_000_u64, "plan": "gold"});
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        claims
    }

    #[test]
    fn a_valid_token_gives_its_claims() {
        let claims = verifier().verify(&token(Algorithm::HS256, claims(json!({})))).unwrap();
        assert_eq!(claim(&claims, "plan").as_deref(), Some("gold"));
    }

    #[test]
    fn what_is_not_valid_is_refused() {
        let verifier = verifier();
        for (algorithm, more) in [
            (Algorithm::HS256, json!({"exp": 1})),
            (Algorithm::HS256, json!({"nbf": 4_000_000_000_u64})),
            (Algorithm::HS256, json!({"iss": "you"})),
            (Algorithm::HS256, json!({"aud": "bank"})),
            // The key is for another algorithm.
            (Algorithm::HS384, json!({})),
        ] {
            assert!(verifier.verify(&token(algorithm, claims(more.clone()))).is_err(), "{algorithm:?} {more}");
        }
        for missing in ["iss", "aud", "exp"] {
            let mut claims = claims(json!({}));
            claims.as_object_mut().unwrap().remove(missing);
            assert!(verifier.verify(&token(Algorithm::HS256, claims)).is_err(), "without {missing}");
        }
        let mut broken = token(Algorithm::HS256, claims(json!({})));
        broken.truncate(broken.len() - 2);
        assert!(verifier.verify(&broken).is_err());
    }

    #[test]
    fn claims_within_claims_and_lists() {
        let claims = json!({"org": {"id": 7}, "roles": ["a", "b"], "deep": {}});
        assert_eq!(claim(&claims, "org.id").as_deref(), Some("7"));
        assert_eq!(claim(&claims, "roles").as_deref(), Some("a,b"));
        assert_eq!(claim(&claims, "deep"), None);
        assert_eq!(bearer("bearer  abc"), Some("abc"));
        assert_eq!(bearer("Basic abc"), None);
    }
}
