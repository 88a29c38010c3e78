"""A real deployment on this machine gives the in-process federation."""

import json
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from weightshare.errors import UserError
from weightshare.federated import FederateConfig
from weightshare.federated.apps import server
from weightshare.federated.grid import key_of
from weightshare.federated.roster import fingerprint, fingerprint_of_file
from weightshare.federated.simulation import simulate

loopback = pytest.importorskip("federated.loopback")


@pytest.mark.slow
def test_tls_and_authenticated_nodes_give_the_reputations_of_the_process(tmp_path):
    found = loopback.deploy(tmp_path / "loopback", rounds=5)
    assert found["rounds"] == 5 and found["confirmed"] == 3 and found["rejected"] == 0
    here = simulate(FederateConfig(rounds=5, training="loop", **loopback.RUN))
    here.run()
    expected = here.reputation.standing.reputation
    assert found["reputation"] == pytest.approx(expected, abs=1e-6)
    # The fourth never came online; the fifth did, and took no part.
    log = (tmp_path / "loopback" / "superlink.log").read_text()
    assert "No SuperNode found with the given public key" in log
    assert set(found["reputation"]) == {"p01", "p02", "p03"}


def test_the_operator_observes_first_and_takes_back_a_wrong_removal(tmp_path):
    roster = {name: fingerprint(key_of(name)) for name in ("p01", "p02", "p03", "x01")}
    (tmp_path / "roster.json").write_text(json.dumps(roster))

    def session(rounds, **more):
        facts = loopback.RUN | {"rounds": rounds, "roster": str(tmp_path / "roster.json"), **more}
        attack = FederateConfig(
            rounds=rounds, attack="sign_flip", adversaries=1, training="loop", **loopback.RUN
        )
        context = Context(1, 1, {}, RecordDict(), facts)
        server(simulate(attack).grid, context)
        return json.loads((Path(facts["folder"]) / "result.json").read_text())

    watched = session(12, folder=str(tmp_path / "watched"), observe=True)
    assert not watched["expelled"] and "x01" in watched["reputation"]
    removed = session(12, folder=str(tmp_path / "server"))
    assert set(removed["expelled"]) == {"x01"} and "x01" not in removed["reputation"]
    back = session(13, folder=str(tmp_path / "server"), readmit="x01")
    assert not back["expelled"] and "x01" in back["reputation"] and back["confirmed"] == 4


def test_a_public_key_file_has_the_fingerprint_that_the_superlink_sees(tmp_path):
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    from weightshare.federated.roster import Roster

    loopback.node_keys(tmp_path, "n")
    stored = public_key_to_bytes(load_ssh_public_key((tmp_path / "n.pub").read_bytes()))
    roster = Roster({"ann": fingerprint_of_file(tmp_path / "n.pub")})
    assert roster.name_of(stored) == "ann"
    (tmp_path / "bad.pub").write_text("nothing")
    with pytest.raises(UserError, match="ssh-keygen"):
        fingerprint_of_file(tmp_path / "bad.pub")
