//! Capabilities and parameters of a migration: changed for ours, and put back as they were.

use libsg::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::qmp::Qmp;

/// What was changed, as it was before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Sets capabilities and parameters, and notes what they were. Where one is refused, those before it are put back.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] naming what QEMU does not have, or in its own words why it does not allow it; [`Qmp::execute`]'s.
    pub fn change(qmp: &mut Qmp, capabilities: &[(&str, bool)], parameters: &[(&str, u64)]) -> Result<Self> {
        let mut changed = Self::default();
        match changed.apply(qmp, capabilities, parameters) {
            Ok(()) => Ok(changed),
            Err(error) => match changed.restore(qmp) {
                Ok(()) => Err(error),
                Err(cause) => {
                    let message = format!("{}; and what was changed before is not put back", error.chain());
                    Err(Error::new(ErrorKind::Vm, message).because(cause))
                }
            },
        }
    }

    fn apply(
        &mut self,
        qmp: &mut Qmp,
        capabilities: &[(&str, bool)],
        parameters: &[(&str, u64)],
    ) -> Result<()> {
        let before = crate::settings::capabilities(qmp)?;
        for (name, wanted) in capabilities {
            let is = before.iter().find(|(known, _)| known == name).map(|(_, is)| *is);
            match is {
                None => return Err(lacks("capability", name, qmp)),
                Some(is) if is == *wanted => {}
                Some(is) => {
                    set_capability(qmp, name, *wanted)?;
                    self.capabilities.push(((*name).to_owned(), is));
                }
            }
        }
        let before = qmp.execute("query-migrate-parameters", &json!({}))?;
        for (name, wanted) in parameters {
            let Some(is) = before.get(name) else { return Err(lacks("parameter", name, qmp)) };
            // Noted though it be the same: whoever asks for it may change it again.
            self.parameters.insert((*name).to_owned(), is.clone());
            qmp.execute("migrate-set-parameters", &json!({ *name: wanted }))?;
        }
        Ok(())
    }

    /// Puts back what was changed. May be said twice.
    ///
    /// # Errors
    /// [`Qmp::execute`]'s: what is left is put back by the next call.
    pub fn restore(&mut self, qmp: &mut Qmp) -> Result<()> {
        while let Some((name, was)) = self.capabilities.last() {
            set_capability(qmp, name, *was)?;
            self.capabilities.pop();
        }
        if !self.parameters.is_empty() {
            qmp.execute("migrate-set-parameters", &Value::Object(self.parameters.clone()))?;
            self.parameters.clear();
        }
        Ok(())
    }
}

/// The capabilities that a QEMU has, and whether they are on.
pub(crate) fn capabilities(qmp: &mut Qmp) -> Result<Vec<(String, bool)>> {
    let told = qmp.execute("query-migrate-capabilities", &json!({}))?;
    let one = |entry: &Value| Some((entry["capability"].as_str()?.to_owned(), entry["state"].as_bool()?));
    Ok(told.as_array().into_iter().flatten().filter_map(one).collect())
}

fn set_capability(qmp: &mut Qmp, name: &str, on: bool) -> Result<()> {
    let one = json!([{ "capability": name, "state": on }]);
    qmp.execute("migrate-set-capabilities", &json!({ "capabilities": one })).map(drop)
}

fn lacks(what: &str, name: &str, qmp: &Qmp) -> Error {
    let message =
        format!("this QEMU ({}) has no {what} {name} of migrations: use 7.2 or newer", qmp.version());
    Error::new(ErrorKind::Vm, message)
}
