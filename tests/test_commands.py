"""`scan` and `compare` in the terminal, and a sentence for everything that they cannot read."""

import json
import pickle
import shutil

import helpers.tiny_texts as tiny
import pytest
import torch
from helpers.tiny_models import one_thread  # noqa: F401
from safetensors.torch import save_file

from inflection_fast import cli
from inflection_fast.decide import Plan


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "a")
    shutil.copytree(folder / "a", folder / "b")
    from safetensors.torch import load_file

    weights = load_file(folder / "b" / "model.safetensors")
    torch.manual_seed(0)
    moved = {name: w + 0.3 * w.std() * torch.randn_like(w) if w.ndim > 1 else w for name, w in weights.items()}
    save_file(moved, folder / "b" / "model.safetensors", metadata={"format": "pt"})
    (folder / "texts.txt").write_text("\n".join(row["text"] for row in tiny.reviews(24)) + "\n")
    return folder


def run(capsys, *argv):
    code = cli.main([str(one) for one in argv])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err  # lines are cut at 80 columns


def refused(capsys, *argv):
    """The one sentence with which a command ends."""
    code, _, err = run(capsys, *argv)
    assert code == 2 and err.startswith("inflection-fast: ") and err.count("\n") == 1, err
    return err


def test_compare_writes_a_table_a_page_and_json(models, tmp_path, capsys):
    data = ("--data", models / "texts.txt", "--out", tmp_path / "c")
    code, out, _ = run(capsys, "compare", models / "a", models / "b", *data)
    assert code == 0 and "has changed most: delta-CKA" in out and "1 - CKA" in out
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert len(found["delta"]) == 3 and "activation_grad" in found["drift"]
    page = (tmp_path / "c" / "index.html").read_text()
    assert "CKA of A and B" in page and "Delta-CKA, angular form" in page
    assert run(capsys, "compare", models / "a", models / "b", *data)[0] == 0  # again, into the same folder


def test_compare_has_texts_of_its_own(models, tmp_path, capsys):
    code, out, _ = run(capsys, "compare", models / "a", models / "a", "--out", tmp_path)
    assert code == 0 and "The weights of all blocks are equal." in out and "of 64 texts" in out


def test_scan_writes_a_table_a_page_a_plan_and_settings(models, tmp_path, capsys):
    code, out, _ = run(
        capsys, "scan", models / "a", "--data", models / "texts.txt", "--out", tmp_path, "--top", 1, "--rank", 2,
        "--plan", tmp_path / "p.json", "--yaml", "axolotl",
    )  # fmt: skip
    assert code == 0 and "Layer" in out and "lora_target_modules:" in out
    assert len(Plan.load(tmp_path / "p.json").layers) == 1
    assert json.loads((tmp_path / "scan.json").read_text())["texts"]["texts"] == 24
    assert "CKA of layers" in (tmp_path / "index.html").read_text()


def test_scan_of_weights_alone(models, tmp_path, capsys):
    code, out, _ = run(capsys, "scan", models / "a" / "model.safetensors", "--out", tmp_path)
    assert code == 0 and "q_proj" in out and "--data texts.txt" in out


@pytest.mark.parametrize("command", ["scan", "compare"])
def test_help_fits_a_screen(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100


# ---- what cannot be read ---------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (open, ("was_run", "w"))


def test_folders_that_are_no_model(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "is no model, the folder has neither a configuration nor weights" in refused(
        capsys, "scan", tmp_path / "empty"
    )
    assert "there is no such file or folder" in refused(capsys, "scan", "./nowhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert "holds an adapter alone" in refused(capsys, "scan", tmp_path / "adapter")
    assert "expected a folder, a .safetensors or a .gguf file" in refused(capsys, "scan", models / "texts.txt")
    assert "is no model" in refused(capsys, "compare", models / "a", tmp_path / "empty")


def test_no_pickle_is_loaded(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "a", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    for model in (tmp_path / "m", tmp_path / "m" / "pytorch_model.bin"):
        assert "the weights are pickled (pytorch_model.bin)" in refused(capsys, "scan", model)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_damaged_weights_are_a_sentence(models, tmp_path, capsys, name):
    shutil.copytree(models / "a", tmp_path / "m")
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").unlink()
    asked = ("--data", models / "texts.txt", "--out", tmp_path / "out")
    for damaged in (b"nothing that weights begin with", whole[: len(whole) // 2]):
        (tmp_path / "m" / name).write_bytes(damaged)
        assert "cannot be read" in refused(capsys, "scan", tmp_path / "m", "--out", tmp_path / "out")
        refused(capsys, "scan", tmp_path / "m", *asked)


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shards_are_named(tmp_path, capsys, indexed):
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model-00002-of-00003.safetensors")
    if indexed:
        names = {str(i): f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    said = refused(capsys, "scan", tmp_path)
    assert "2 of 3 shards are missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in said


def test_an_index_leads_nowhere_else(tmp_path, capsys):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    assert "expected names of files in its folder" in refused(capsys, "scan", tmp_path)
    index.write_text("[]")
    assert "is no index of shards" in refused(capsys, "scan", tmp_path)


def test_weights_without_a_tokenizer_or_configuration(models, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models / "a" / name, tmp_path)
    asked = ("--data", models / "texts.txt", "--out", tmp_path / "out")
    assert "has no tokenizer" in refused(capsys, "scan", tmp_path, *asked)
    assert "has no tokenizer" in refused(capsys, "compare", tmp_path, models / "a", *asked)
    (tmp_path / "config.json").unlink()
    shutil.copy(models / "a" / "tokenizer.json", tmp_path)
    shutil.copy(models / "a" / "tokenizer_config.json", tmp_path)
    assert "has no config.json, so only its weights can be read" in refused(capsys, "scan", tmp_path, *asked)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"only one text\n", "holds 1 text, expected at least 4"),
        (b"\x7fELF\0\0\x01\0" * 40, "is no text, it holds bytes of 0"),
        (b"a\n\xff\xfe\xfd\x81\nb\n", "the file is not UTF-8"),
        (b"", "there is no row in it"),
    ],
)
def test_texts_that_are_none(models, tmp_path, capsys, content, says):
    (tmp_path / "t.txt").write_bytes(content)
    asked = ("--data", tmp_path / "t.txt", "--out", tmp_path / "out")
    assert says in refused(capsys, "scan", models / "a", *asked)
    assert says in refused(capsys, "compare", models / "a", models / "b", *asked)


def test_what_needs_texts_says_so_at_once(models, tmp_path, capsys):
    for option in ("--plan", "--yaml", "--top"):
        value = {"--plan": "p.json", "--yaml": "trl", "--top": "2"}[option]
        assert f"{option}: needs --data" in refused(capsys, "scan", models / "a", option, value)
    assert "expected one of axolotl, llama-factory" in refused(capsys, "scan", models / "a", "--yaml", "x")
    assert "leaves nothing to scan" in refused(capsys, "scan", models / "a", "--no-weights")


def test_a_run_is_not_written_into(models, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert "holds a run" in refused(capsys, "compare", models / "a", models / "b", "--out", tmp_path)


def test_no_name_becomes_markup(models, tmp_path, capsys):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(models / "a", folder)
    assert run(capsys, "scan", folder, "--out", tmp_path / "s")[0] == 0
    assert run(capsys, "compare", folder, models / "b", "--out", tmp_path / "c")[0] == 0
    for page in (tmp_path / "s" / "index.html", tmp_path / "c" / "index.html"):
        text = page.read_text()
        assert "<img src" not in text and "&lt;img src=x" in text
