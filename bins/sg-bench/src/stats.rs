//! Medians and spreads of repeated runs, of single numbers and of whole reports.

use serde_json::Value;

/// The middle value, or the mean of the two in the middle; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => sorted.get(middle).copied(),
        _ => Some((sorted.get(middle - 1)? + sorted.get(middle)?) / 2.0),
    }
}

/// The least value that so many percent are not above; `None` of nothing. The values are in order.
pub fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// The smallest and the largest value.
pub fn spread(values: &[f64]) -> Option<(f64, f64)> {
    let least = values.iter().copied().reduce(f64::min)?;
    let most = values.iter().copied().reduce(f64::max)?;
    Some((least, most))
}

/// Folds reports key by key: numbers by `fold`, objects and equally long arrays part by part; whatever is not a
/// number in every report becomes what all agree on, or null.
pub fn fold(reports: &[Value], by: &impl Fn(&[f64]) -> Option<f64>) -> Value {
    let Some(first) = reports.first() else {
        return Value::Null;
    };
    match first {
        Value::Object(keys) => {
            let of = |key: &String| reports.iter().map(|r| r[key].clone()).collect::<Vec<_>>();
            Value::Object(keys.keys().map(|key| (key.clone(), fold(&of(key), by))).collect())
        }
        Value::Array(items)
            if reports.iter().all(|r| r.as_array().is_some_and(|a| a.len() == items.len())) =>
        {
            let of = |i: usize| reports.iter().map(|r| r[i].clone()).collect::<Vec<_>>();
            Value::Array((0..items.len()).map(|i| fold(&of(i), by)).collect())
        }
        Value::Number(_) => {
            let numbers: Option<Vec<f64>> = reports.iter().map(Value::as_f64).collect();
            numbers.and_then(|n| by(&n)).map_or(Value::Null, Value::from)
        }
        other if reports.iter().all(|r| r == other) => other.clone(),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn medians_and_spreads() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[f64::NAN, 5.0]), Some(5.0));
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((1.0, 3.0)));
        assert_eq!(spread(&[]), None);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50.0, 99.0, 100.0].map(|p| percentile(&hundred, p)), [50.0, 99.0, 100.0].map(Some));
        assert_eq!((percentile(&[7.0], 1.0), percentile(&[], 50.0)), (Some(7.0), None));
    }

    #[test]
    fn reports_fold_key_by_key() {
        let runs = [
            json!({"a": 1, "b": {"c": 5.0}, "d": "ok", "e": [1, 2], "f": [1], "g": null, "h": 1}),
            json!({"a": 3, "b": {"c": 7.0}, "d": "ok", "e": [3, 6], "f": [], "g": null, "h": null}),
        ];
        assert_eq!(
            fold(&runs, &median),
            json!({"a": 2.0, "b": {"c": 6.0}, "d": "ok", "e": [2.0, 4.0], "f": null, "g": null, "h": null})
        );
        assert_eq!(fold(&[], &median), Value::Null);
    }
}
