//! Hosts that are emptied, to where operators say.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::world::{World, json, until};

#[test]
fn each_vm_goes_to_its_destination_and_is_followed_there() {
    let mut world = World::new(1);
    world.vms(&["web", "db"]);
    let (mut to, mut there) = (Vec::new(), Vec::new());
    for name in ["one", "two"] {
        let free = test_support::free_address().to_string();
        there.push(world.vmm("there", name, &["--incoming", &free]));
        to.push(free);
    }
    let gathering = world.sg(&["gather", "--json", "-"]).args(&there).spawn().unwrap();
    let mut evict = world.evict(&["--to", &to[0], "--to", &to[1], "--weight", "web=2", "--explain"]);
    let output = evict.args(world.named()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    assert_eq!((&report["status"], &report["plan"]["fits"]), (&"ok".into(), &true.into()), "{report}");
    assert!(report["host"]["eviction_s"].as_f64().is_some_and(|s| s > 0.0), "{report}");
    let vms = report["vms"].as_array().unwrap();
    let names: Vec<_> = vms.iter().map(|vm| vm["vm"].as_str().unwrap()).collect();
    assert_eq!(names, ["db", "web"], "by their sockets' names");
    for (vm, to) in vms.iter().zip(&to) {
        assert_eq!((&vm["status"], &vm["mode"]), (&"ok".into(), &"scatter-gather".into()));
        assert_eq!((vm["to"].as_str(), &vm["parked_as"]), (Some(&**to), &serde_json::Value::Null));
        assert!(vm["eviction_s"].as_f64().is_some() && vm["pages"]["total"] == super::world::PAGES);
    }
    let sum: u64 = vms
        .iter()
        .map(|vm| vm["bytes"]["direct"].as_u64().unwrap() + vm["bytes"]["staged"].as_u64().unwrap())
        .sum();
    assert_eq!(report["host"]["bytes"], sum);

    let gathered = gathering.wait_with_output().unwrap();
    assert_eq!(gathered.status.code(), Some(0), "{gathered:?}");
    let arrived = json(&gathered);
    assert!(arrived["vms"].as_array().unwrap().iter().all(|vm| vm["status"] == "ok"), "{arrived}");
    assert!(world.is_whole("there", "one") && world.is_whole("there", "two"));

    // They are out: nothing is to be done any more, and that is no failure.
    let again = world.evict(&["--to", &to[0]]).output().unwrap();
    assert_eq!(
        (again.status.code(), json(&again)["vms"].as_array().unwrap().len()),
        (Some(0), 0),
        "{again:?}"
    );
}

#[test]
fn vms_are_parked_in_a_pool_that_is_looked_at_first_and_claimed_there() {
    let [a, b, c, d] = libsg::ids::random_bytes().unwrap();
    let port = 30_000 + u16::from_le_bytes([c, d]) % 10_000;
    let place = format!("239.255.{a}.{b}:{port}@127.0.0.1");
    let mut world = World::new(0);
    let secret = world.path("secret").to_str().unwrap().to_owned();
    std::fs::write(&secret, "the secret of this pool").unwrap();
    for name in ["a", "b"] {
        world.serve(&["--name", name, "--secret", &secret]);
    }
    let _announced = world.announce(&place, &secret);
    for name in ["web", "db"] {
        world.vmm("here", name, &["--memory", "16M", "--workload", "idle", "--secret", &secret]);
    }
    let pool = format!("multicast:{place}");
    let at = ["--pool", &pool, "--secret", &secret];
    let parked = |more: &[&str]| {
        let mut evict = world.evict(&["--park", "rack7", "--link", "1gbit"]);
        evict.args(at).args(more).output().unwrap()
    };
    let planned = parked(&["--dry-run", "--deadline", "1ms", "--explain"]);
    let plan = json(&planned);
    assert_eq!((planned.status.code(), &plan["plan"]["fits"]), (Some(1), &false.into()), "{plan}");
    assert!(plan["vms"].as_array().unwrap().iter().all(|vm| vm["fits"] == false), "{plan}");
    let waves: Vec<_> = plan["vms"].as_array().unwrap().iter().map(|vm| vm["wave"].as_u64()).collect();
    assert_ne!(waves[0], waves[1], "one by one: {plan}");
    let said = String::from_utf8_lossy(&planned.stderr).into_owned();
    assert!(said.contains("NOT out within") && said.contains("parked as rack7-db"), "{said}");
    assert_eq!(parked(&["--deadline", "1ms", "--strict"]).status.code(), Some(1));
    for name in ["web", "db"] {
        assert_eq!(world.state("here", name), "here", "nothing was done");
    }
    let mut hybrid = json(&planned);
    until("hosts of the pool are heard", || {
        hybrid = json(&parked(&["--dry-run", "--deadline", "10m"]));
        hybrid["plan"]["fits"] == true
    });
    assert_eq!(hybrid["plan"]["mode"], "hybrid", "{hybrid}");

    // It does not fit, and goes all the same: what leaves is out, whenever that is.
    let mut report = json(&planned);
    until("hosts of the pool are heard", || {
        let output = parked(&["--deadline", "1ms"]);
        report = json(&output);
        output.status.code() == Some(0)
    });
    let names: Vec<_> = report["vms"].as_array().unwrap().iter().map(|vm| vm["parked_as"].clone()).collect();
    assert_eq!(names, ["rack7-db", "rack7-web"]);

    let (one, two) = ("one", "two");
    for name in [one, two] {
        world.vmm("there", name, &["--empty", "--secret", &secret]);
    }
    let mut gather = world.sg(&["gather", "--json", "-", "--claim", "rack7-web", "--claim", "rack7-db"]);
    gather.arg(world.path("there").join("one.sock")).arg(world.path("there").join("two.sock"));
    let gathered = gather.args(at).output().unwrap();
    assert_eq!(gathered.status.code(), Some(0), "{gathered:?}");
    until("it is whole", || world.is_whole("there", one) && world.is_whole("there", two));
    let mut again = world.sg(&["gather", "--claim", "rack7-web"]);
    world_empty(&mut world, &secret);
    let refused = again.arg(world.path("there").join("three.sock")).args(at).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "once of all that claim it: {refused:?}");
}

#[test]
fn what_vms_of_a_domain_have_alike_is_sent_once() {
    let mut world = World::new(2);
    for name in ["a", "b", "c"] {
        world.vmm("here", name, &["--memory", "16M", "--workload", "idle", "--common", "0.9"]);
    }
    let mut evict = world.evict(&["--park", "--dedup", "tenant", "--dedup", "c=other"]);
    let output = evict.args(world.named()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    let vms = report["vms"].as_array().unwrap();
    let domains: Vec<_> = vms.iter().map(|vm| vm["domain"].as_str().unwrap()).collect();
    assert_eq!(domains, ["tenant", "tenant", "other"]);
    let saved = |at: usize| vms[at]["bytes"]["dedup_saved"].as_u64().unwrap();
    let page_bytes = 4096;
    // Both send at once: what is under way at the same moment is sent twice.
    assert!(saved(0) + saved(1) > super::world::PAGES * page_bytes / 4, "{report}");
    assert!(saved(2) < super::world::PAGES * page_bytes / 4, "nobody is in its domain: {report}");
    for name in ["a", "b", "c"] {
        world.vmm("there", name, &["--empty"]);
    }
    let mut gather = world.sg(&["gather", "--claim", "a", "--claim", "b", "--claim", "c"]);
    gather.args(["a", "b", "c"].map(|name| world.path("there").join(format!("{name}.sock"))));
    let gathered = gather.args(world.named()).output().unwrap();
    assert_eq!(gathered.status.code(), Some(0), "{gathered:?}");
    assert!(["a", "b", "c"].iter().all(|name| world.is_whole("there", name)));
}

fn world_empty(world: &mut World, secret: &str) {
    world.vmm("there", "three", &["--empty", "--secret", secret]);
}

#[test]
fn what_cannot_be_is_said() {
    let mut world = World::new(1);
    let code = |world: &World, arguments: &[&str]| world.sg(arguments).output().unwrap().status.code();
    let here = world.path("here");
    let here = here.to_str().unwrap();
    assert_eq!(code(&world, &["evict"]), Some(2), "no socket");
    assert_eq!(code(&world, &["evict", "--all", here, "--park"]), Some(2), "none in it");
    assert_eq!(code(&world, &["evict", "--all", "/nonexistent", "--park"]), Some(2));
    world.vms(&["web"]);
    assert_eq!(code(&world, &["evict", "--all", here]), Some(2), "where to");
    assert_eq!(code(&world, &["evict", "--all", here, "--park"]), Some(2), "at whom");
    assert_eq!(code(&world, &["evict", "--all", here, "--park", "--to", "127.0.0.1:1"]), Some(2));
    assert_eq!(code(&world, &["evict", "--all", here, "--park", "--dedup", "web="]), Some(2), "no domain");
    let socket = world.path("here").join("web.sock");
    let socket = socket.to_str().unwrap();
    assert_eq!(code(&world, &["limit", socket]), Some(2));
    assert_eq!(code(&world, &["limit", socket, "--scatter", "1gbit"]), Some(1), "nothing leaves");
    assert_eq!(code(&world, &["cancel", socket]), Some(1), "nothing to cancel");
    assert_eq!(code(&world, &["gather", socket, "--claim", "a", "--claim", "b"]), Some(2));
    let nowhere = world.path("there").join("none.sock");
    let refused =
        world.sg(&["evict", nowhere.to_str().unwrap(), "--park"]).args(world.named()).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    // Nobody listens there: the VM stays.
    let refused = world.evict(&["--to", "127.0.0.1:1"]).args(world.named()).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(json(&refused)["vms"][0]["status"]["kind"], "unreachable");
    assert_eq!(world.state("here", "web"), "here");
    assert!(world.is_whole("here", "web"));
}

#[test]
fn what_libraries_warn_of_is_on_standard_error() {
    let directory = tempfile::tempdir().unwrap();
    let [secret, socket] = ["pool.secret", "no.qmp"].map(|name| directory.path().join(name));
    std::fs::write(&secret, [b'x'; 32]).unwrap();
    std::fs::set_permissions(&secret, Permissions::from_mode(0o644)).unwrap();
    for (level, is_said) in [(None, true), (Some("error"), false)] {
        let mut gather = Command::new(env!("CARGO_BIN_EXE_sg"));
        gather.args(["gather", "--listen", "127.0.0.1:0", "--qmp"]).arg(&socket).arg("--secret").arg(&secret);
        gather.env_remove("RUST_LOG").envs(level.map(|level| ("RUST_LOG", level)));
        let output = gather.output().unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(said.contains("chmod o-r"), is_said, "{said}");
        assert!(said.contains("no QEMU listens"), "{said}");
    }
}
