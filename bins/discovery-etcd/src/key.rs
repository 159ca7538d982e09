//! Under which key a host announces itself: `PREFIX/NAME.INCARNATION`, so that of a key alone it is known who is gone
//! when it is deleted.

use libsg::ids::NodeId;
use libsg::limits::NODE_NAME_BYTES_MAX;

/// Bytes of an incarnation in hexadecimal.
const INCARNATION_DIGITS: usize = 16;

/// The key of a host.
pub fn of(prefix: &str, node: &NodeId) -> String {
    let mut key = format!("{prefix}/");
    for byte in node.name.bytes() {
        if byte.is_ascii_alphanumeric() || b"_-".contains(&byte) {
            key.push(char::from(byte));
        } else {
            key.push_str(&format!("%{byte:02x}"));
        }
    }
    key.push_str(&format!(".{:016x}", node.incarnation));
    key
}

/// Whose key it is; `None` for one that [`of`] makes of nobody.
pub fn node(prefix: &str, key: &[u8]) -> Option<NodeId> {
    let rest = key.strip_prefix(prefix.as_bytes())?.strip_prefix(b"/")?;
    if rest.len() > 3 * NODE_NAME_BYTES_MAX + 1 + INCARNATION_DIGITS {
        return None;
    }
    let (name, incarnation) = std::str::from_utf8(rest).ok()?.rsplit_once('.')?;
    let incarnation = u64::from_str_radix(incarnation, 16).ok()?;
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    let node = NodeId { name: String::from_utf8(bytes).ok()?, incarnation };
    // There is one way to write each.
    (of(prefix, &node).as_bytes() == key).then_some(node)
}

/// Where the keys of a pool begin, and the first that is behind them.
pub fn range(prefix: &str) -> (String, String) {
    // '0' is the next after '/'.
    (format!("{prefix}/"), format!("{prefix}0"))
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_says_whose_it_is() {
        let node = NodeId { name: "rack 7.b".into(), incarnation: 0x2a };
        assert_eq!(of("sg/east", &node), "sg/east/rack%207%2eb.000000000000002a");
        for wrong in [
            "sg/east/rack.2a",
            "sg/east/rack.+00000000000002a",
            "sg/east/rack%2.000000000000002a",
            "sg/east/rack%2E.000000000000002a",
            "sg/east/rack%41.000000000000002a",
            "sg/east/a/b.000000000000002a",
            "sg/eastern/rack.000000000000002a",
            "sg/east/%ff.000000000000002a",
            "sg/east/",
            "",
        ] {
            assert_eq!(super::node("sg/east", wrong.as_bytes()), None, "{wrong}");
        }
        let long = format!("sg/east/{}.000000000000002a", "x".repeat(1000));
        assert_eq!(super::node("sg/east", long.as_bytes()), None);
    }

    proptest! {
        #[test]
        fn every_name_comes_back(name in "\\PC{1,16}", incarnation: u64) {
            let node = NodeId { name, incarnation };
            let key = of("sg", &node);
            let (begin, end) = range("sg");
            prop_assert!(key > begin && key < end);
            prop_assert_eq!(super::node("sg", key.as_bytes()), Some(node));
        }

        #[test]
        fn any_bytes_are_a_key_or_not(key in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(node) = super::node("sg", &key) {
                prop_assert_eq!(of("sg", &node).into_bytes(), key.clone());
            }
            let _ = super::node("sg", &[b"sg/", &key[..]].concat());
        }
    }
}
