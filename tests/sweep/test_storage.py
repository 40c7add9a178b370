"""Where studies are kept: a journal that survives what dies in it, databases that come and go."""

import json
import subprocess
import sys
import threading

import optuna
import pytest
from parallel import free_port

from safe_lab.section import ConfigError
from safe_lab.sweep import storage as storages
from safe_lab.sweep.storage import default_address, hide_password, open_storage


def test_a_journal_whose_last_line_was_cut_off_loses_that_line_alone(tmp_path, caplog):
    path = tmp_path / "study.journal"
    study = optuna.create_study(study_name="s", storage=open_storage(f"journal://{path}"))
    study.add_trial(optuna.trial.create_trial(value=1.0))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    again = optuna.load_study(study_name="s", storage=open_storage(f"journal://{path}"))
    again.add_trial(optuna.trial.create_trial(value=2.0))
    assert "cut off in a write" in caplog.text
    last = optuna.load_study(study_name="s", storage=open_storage(f"journal://{path}"))
    assert [trial.value for trial in last.trials] == [1.0, 2.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_process_killed_while_it_holds_the_journal_holds_up_nobody(tmp_path):
    path = tmp_path / "study.journal"
    optuna.create_study(study_name="s", storage=open_storage(f"journal://{path}"))
    program = (
        "import sys, time\n"
        "from safe_lab.sweep.storage import _FlockOnJournal\n"
        "_FlockOnJournal(sys.argv[1]).acquire()\n"
        "print('held', flush=True)\n"
        "time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    study = optuna.load_study(study_name="s", storage=open_storage(f"journal://{path}"))
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert len(study.trials) == 1


def test_the_dashboards_own_reader_opens_the_journal(tmp_path):
    path = tmp_path / "study.journal"
    optuna.create_study(study_name="s", storage=open_storage(f"journal://{path}")).add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    plain = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    assert len(optuna.load_study(study_name="s", storage=plain).trials) == 1


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("study.db", "an address such as postgresql://"),
        ("postgresq://x/y", "Can't load plugin"),
        ("grpc://somewhere", "it reads grpc://HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_told(address, fault):
    with pytest.raises(ConfigError, match=fault):
        open_storage(address)


def test_a_storage_that_does_not_answer_is_asked_again_and_then_told_without_its_password(monkeypatch, caplog):
    monkeypatch.setattr(storages, "FIRST_PATIENCE_SECONDS", 2.0)
    with pytest.raises(ConfigError, match=r"postgresql://me:\*\*\*@127.0.0.1:\d+/x does not answer: ") as told:
        open_storage(f"postgresql://me:secret@127.0.0.1:{free_port()}/x")
    assert "secret" not in str(told.value)
    assert "trying again" in caplog.text
    assert "secret" not in caplog.text


def test_a_password_is_not_shown():
    assert hide_password("mysql://me:se:cr@et@host/db") != "mysql://me:se:cr@et@host/db"
    assert "secret" not in hide_password("postgresql+psycopg://me:secret@host:5432/db?x=1")
    assert "secret" not in hide_password("mysql://host/db?user=me&password=secret&x=1")
    assert hide_password("sqlite:///runs/study.db") == "sqlite:///runs/study.db"


def test_one_worker_has_a_database_and_several_a_journal(tmp_path):
    assert default_address(tmp_path, several=False).startswith("sqlite:///")
    assert default_address(tmp_path, several=True).startswith("journal://")


def test_a_database_that_is_away_for_a_moment_is_waited_for(postgresql, caplog):
    study = optuna.create_study(study_name="s", storage=open_storage(postgresql.address))
    trial = study.ask()
    postgresql.stop()
    back = threading.Timer(1.5, postgresql.start)
    back.start()
    study.tell(trial, 1.0)
    back.join()
    assert [trial.value for trial in study.trials] == [1.0]
    assert "does not answer" in caplog.text
