//! What is said to etcd's JSON gateway, and what it answers. Bytes are base64 there, and large numbers text.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

/// What has no key or no lease: gRPC's code.
pub const NOT_FOUND: i64 = 5;

/// Keys in one piece of a listing: with what is allowed of one, less than a quarter of
/// [`crate::client::ANSWER_BYTES_MAX`].
pub const LIST_KEYS: usize = 256;

/// Bytes as base64.
fn base64(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// A piece of a listing: keys from the first on, as they were at a revision (now, where it is 0).
pub fn list(from: &str, end: &str, revision: i64) -> Value {
    json!({
        "key": base64(from),
        "range_end": base64(end),
        "limit": LIST_KEYS.to_string(),
        "revision": revision.to_string(),
    })
}

/// A watch of keys, from a revision on. etcd says now and then how far it is, so that the revision does not grow too old.
pub fn watch(from: &str, end: &str, revision: i64) -> Value {
    json!({ "create_request": {
        "key": base64(from),
        "range_end": base64(end),
        "start_revision": revision.to_string(),
        "progress_notify": true,
    } })
}

/// A key that lives as long as a lease, for ever where that is 0.
pub fn put(key: &str, value: &[u8], lease: i64) -> Value {
    json!({ "key": base64(key), "value": base64(value), "lease": lease.to_string() })
}

/// Keys that are put if one was last put at that revision, and is not there where that is 0.
pub fn change(key: &str, revision: i64, puts: Vec<Value>) -> Value {
    let puts: Vec<Value> = puts.into_iter().map(|put| json!({ "request_put": put })).collect();
    json!({
        "compare": [{
            "key": base64(key),
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": revision.to_string(),
        }],
        "success": puts,
    })
}

/// A lease of so many seconds.
pub fn grant(seconds: u64) -> Value {
    json!({ "TTL": seconds.to_string() })
}

/// One lease, by its number.
pub fn lease(id: i64) -> Value {
    json!({ "ID": id.to_string() })
}

/// A number, which the gateway writes as text where it has 64 bits, and leaves out where it is zero.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number<'a> {
        Plain(i64),
        Text(&'a str),
    }
    match Number::deserialize(from)? {
        Number::Plain(number) => Ok(number),
        Number::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

/// Bytes as they came: decoded when it is known that they are not too many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Base64(String);

impl Base64 {
    /// The bytes, if they are so many at most.
    pub fn decode(&self, bytes_max: usize) -> Option<Vec<u8>> {
        if self.0.len() > bytes_max.div_ceil(3) * 4 {
            return None;
        }
        STANDARD.decode(&self.0).ok().filter(|bytes| bytes.len() <= bytes_max)
    }

    #[cfg(test)]
    pub fn of(bytes: &[u8]) -> Self {
        Self(base64(bytes))
    }
}

/// In front of each answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Header {
    /// Of the whole store, at the moment of the answer.
    #[serde(default, deserialize_with = "number")]
    pub revision: i64,
}

/// A key with what it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct KeyValue {
    /// The key.
    #[serde(default)]
    pub key: Base64,
    /// Empty for one that was deleted.
    #[serde(default)]
    pub value: Base64,
    /// When it was last put or deleted.
    #[serde(default, deserialize_with = "number")]
    pub mod_revision: i64,
    /// The lease that it lives on; 0 for none.
    #[serde(default, deserialize_with = "number")]
    pub lease: i64,
}

/// A piece of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Listed {
    /// When.
    #[serde(default)]
    pub header: Header,
    /// In the order of their keys.
    #[serde(default)]
    pub kvs: Vec<KeyValue>,
    /// There are more behind these.
    #[serde(default)]
    pub more: bool,
}

/// What happened to a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum What {
    /// It holds something new.
    #[default]
    Put,
    /// It is no more.
    Delete,
}

/// Something happened to a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Happened {
    /// What.
    #[serde(default, rename = "type")]
    pub what: What,
    /// To which.
    #[serde(default)]
    pub kv: KeyValue,
}

/// One message of a watch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Watched {
    /// When.
    #[serde(default)]
    pub header: Header,
    /// The watch begins.
    #[serde(default)]
    pub created: bool,
    /// The watch ends.
    #[serde(default)]
    pub canceled: bool,
    /// It ends because what it asked for is forgotten: up to this revision.
    #[serde(default, deserialize_with = "number")]
    pub compact_revision: i64,
    /// Why it ends.
    #[serde(default)]
    pub cancel_reason: String,
    /// What happened, in its order.
    #[serde(default)]
    pub events: Vec<Happened>,
}

/// A lease that was given, or kept; no time is left of one that is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Leased {
    /// Its number.
    #[serde(default, rename = "ID", deserialize_with = "number")]
    pub id: i64,
    /// Seconds left.
    #[serde(default, rename = "TTL", deserialize_with = "number")]
    pub ttl: i64,
}

/// One message of a stream.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Streamed<T> {
    /// What was asked for.
    Result(T),
    /// It ends.
    Error(No),
}

/// Etcd says no. Streams and single answers have other names for the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct No {
    /// gRPC's code.
    #[serde(default, alias = "grpc_code")]
    pub code: i64,
    /// Why.
    #[serde(default)]
    pub message: String,
}

/// What came of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Changed {
    /// It was made.
    #[serde(default)]
    pub succeeded: bool,
}

/// An answer whose content is of no interest.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Done {}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn answers_are_read_as_etcd_writes_them() {
        // From etcd 3.4: what is zero is left out.
        let text = r#"{"result":{"header":{"cluster_id":"1","member_id":"2","revision":"7","raft_term":"2"},
            "events":[{"kv":{"key":"c2cvYQ==","create_revision":"6","mod_revision":"6","version":"1","value":"YmFy",
            "lease":"9"}},{"type":"DELETE","kv":{"key":"c2cvYQ==","mod_revision":"7"}}]}}"#;
        let Streamed::Result(watched) = serde_json::from_str::<Streamed<Watched>>(text).expect("good") else {
            panic!("an error");
        };
        assert_eq!((watched.header.revision, watched.events.len()), (7, 2));
        assert_eq!(watched.events[0].kv.value.decode(3), Some(b"bar".to_vec()));
        assert_eq!((watched.events[1].what, watched.events[1].kv.mod_revision), (What::Delete, 7));
        let text =
            r#"{"error":{"grpc_code":11,"http_code":400,"message":"compacted","http_status":"Bad Request"}}"#;
        let Streamed::Error(no) = serde_json::from_str::<Streamed<Watched>>(text).expect("good") else {
            panic!("no error");
        };
        assert_eq!((no.code, &*no.message), (11, "compacted"));
        let text = r#"{"error":"etcdserver: requested lease not found","message":"requested lease not found","code":5}"#;
        assert_eq!(serde_json::from_str::<No>(text).expect("good").code, NOT_FOUND);
        let leased: Leased = serde_json::from_str(r#"{"header":{},"ID":"7587877"}"#).expect("good");
        assert_eq!((leased.id, leased.ttl), (7_587_877, 0));
        for wrong in [r#"{"ID":"x"}"#, r#"{"ID":1.5}"#, r#"{"ID":"99999999999999999999"}"#, "null", ""] {
            assert!(serde_json::from_str::<Leased>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bytes_are_bounded_before_they_are_decoded() {
        for (bytes, fits) in [(0, true), (2, true), (3, true), (4, false), (1 << 20, false)] {
            let text = Base64::of(&vec![7; bytes]);
            assert_eq!(text.decode(3).is_some(), fits, "{bytes}");
        }
        assert_eq!(Base64("!".into()).decode(3), None);
    }
}
