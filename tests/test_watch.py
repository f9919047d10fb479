import json
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from helpers.tiny_runs import measured, write_timeline

from inflection_fast import cli
from inflection_fast.report import watch
from inflection_fast.report.watch import Server
from inflection_fast.timeline import TimelineWriter

META = {"model": {"class": "M"}}


@pytest.fixture
def following(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.0)
    with Server(tmp_path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def steps_in(server):
    code, body = ask(server, "state?version=-1")
    return json.loads(body)["steps"] if code == 200 else (code, body)


def add(writer, *steps):
    for step in steps:
        writer.append(step, loss=0.5, entropy=np.ones((2, 1)))


def test_a_growing_timeline_is_followed_from_nothing_to_its_end(following, tmp_path):
    assert steps_in(following) == 0
    with TimelineWriter(tmp_path, layers=["a", "b"], heads=1, meta=META) as out:
        assert steps_in(following) == 0
        add(out, 0)
        assert steps_in(following) == 1
        version = following.now().manifest["version"]
        assert ask(following, f"state?version={version}") == (204, b"")
        add(out, 1, 2)
        assert ask(following, f"state?version={version}")[0] == 200
        assert steps_in(following) == 3
    path = tmp_path / "timeline.arrows"
    with open(path, "ab") as file:
        file.write(b"\xff\xff\xff\xff half a row")
    assert steps_in(following) == 3
    with TimelineWriter(tmp_path, layers=["a", "b"], heads=1, meta=META, resume_at=1) as out:
        assert steps_in(following) == 1
        add(out, 5)
        assert steps_in(following) == 2


def test_an_array_belongs_to_a_version(following, tmp_path):
    write_timeline(tmp_path)
    version = following.now().manifest["version"]
    assert ask(following, f"array?id=0&version={version}")[0] == 200
    assert ask(following, f"array?id=0&version={version - 1}")[0] == 409
    for number in ("9999", "-1", "x", ""):
        assert ask(following, f"array?id={number}&version={version}")[0] == 404


def test_a_plan_that_comes_later_is_shown(following, tmp_path):
    from inflection_fast.decide import select
    from inflection_fast.timeline import Timeline

    write_timeline(tmp_path)
    assert following.now().manifest["plan"] is None
    plan = select(Timeline.load(tmp_path))
    plan.save(tmp_path / "plan.json")
    assert following.now().manifest["plan"]["layers"] == list(plan.layers)


def test_training_goes_on_while_a_page_takes_nothing_of_what_it_asked_for(following, tmp_path):
    layers = [f"layer.{i}" for i in range(12)]
    with TimelineWriter(tmp_path, layers=layers, heads=12, meta=META) as out:
        rows = measured()
        out.append(*(lambda row: (row[0],))(first := next(rows)), **first[1])
        slow = [socket.create_connection(following.server_address, timeout=10) for _ in range(8)]
        for connection in slow:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for step, signals in rows:
            out.append(step, **signals)
        assert steps_in(following) == 12
        for connection in slow:
            connection.close()
        assert steps_in(following) == 12
    assert len(out.timeline.steps) == 12 and out.given_up == 0


def test_a_file_that_is_damaged_is_named_and_the_server_goes_on(following, tmp_path):
    write_timeline(tmp_path)
    assert steps_in(following) == 12
    (tmp_path / "plan.json").write_text("{")
    code, body = ask(following, "state?version=-1")
    assert code == 500 and b"plan.json" in body
    (tmp_path / "plan.json").unlink()
    assert steps_in(following) == 12


def test_a_page_of_somebody_else_gets_nothing(following):
    for host in ("evil.example", f"evil.example:{following.server_address[1]}", ""):
        assert ask(following, "", Host=host)[0] == 403
    assert ask(following, "", Host="localhost:1")[0] == 200
    assert ask(following, "../../etc/passwd")[0] == 404
    assert following.server_address[0] == "127.0.0.1"


def test_a_port_in_use_a_wrong_port_and_a_missing_folder_are_a_sentence_each(following, tmp_path, capsys):
    port = following.server_address[1]
    assert cli.main(["watch", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} is in use: choose another one with --port" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path), "--port", "70000"]) == 2
    assert "port: expected a number from 0 to 65535, got 70000" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
