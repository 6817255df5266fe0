"""Nothing that is read runs code: each file of a policy that can name code is planted, on every road that reads it."""

import importlib
import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from safetensors.torch import load_file, save_file

import evaluate
import export
import infer
import serve
import trust
from checkpoints.folder import ALIASES, write_manifest
from checkpoints.tensors import read_optimizer
from errors import UserError
from exchange.lerobot_runs import to_lerobot
from helpers.paths import ROOT
from helpers.runs import small
from policy.adapter_settings import base_model_of
from policy.adapters import load_adapters
from policy.factory import build_policy, load_policy_config, policy_config
from policy.loaded import load_policy
from policy.migration import migrate
from processors.pipelines import load_processors
from processors.saved_steps import check_step_settings
from sim.environments import open_simulation
from train import train

PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A checkpoint of ACT, whose folder is a policy's too."""
    settings = small("act", dataset_id=[str(made("no_camera"))], steps=1)
    return train(**settings, output_dir=str(tmp_path_factory.mktemp("trained") / "run")).checkpoint


@pytest.fixture
def planted(trained, tmp_path, monkeypatch):
    """A copy of the checkpoint, and a marker that code of it would write: by a program, and by a module on the path."""
    folder = Path(shutil.copytree(trained, tmp_path / trained.name))
    (folder / "manifest.json").unlink()  # which the author of such a policy leaves out, or writes anew
    marker = tmp_path / "ran"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "planted.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Step:\n    pass\n"
    )
    monkeypatch.syspath_prepend(modules)
    yield folder, marker
    assert not marker.exists()


def edit(path: Path, change) -> None:
    """Rewrite a JSON file, whose other names stay as they are."""
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content))


def plant(folder: Path, name: str, step: dict) -> None:
    edit(folder / name, lambda pipeline: pipeline["steps"].insert(0, step))
    if (folder / ALIASES[name]).exists():  # a checkpoint's file has both names
        (folder / ALIASES[name]).unlink()
        os.link(folder / name, folder / ALIASES[name])


def program(marker: Path) -> dict:
    return {"class": "subprocess.Popen", "config": {"args": ["touch", str(marker)]}}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("road", [
    "policy_path", "resume", "infer", "evaluate", "serve", "onnx", "lerobot", "load_policy", "lerobot_policy",
    "lerobot_resume", "hub_policy", "hub_policy_path", "hub_resume"])  # fmt: skip
def test_no_road_runs_a_class_that_a_pipeline_names(planted, made, tmp_path, capsys, monkeypatch, name, road):
    folder, marker = planted
    data = str(made("no_camera"))
    if road.startswith("lerobot_"):
        write_manifest(folder)
        folder = to_lerobot(folder, tmp_path / "theirs")
        plant(folder / "pretrained_model", name, program(marker))
    else:
        plant(folder, name, program(marker))
        if road in ("resume", "lerobot", "hub_resume"):
            write_manifest(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: str(folder))
    monkeypatch.setattr("checkpoints.folder.newest_checkpoint", lambda repo, what, sort_key: folder)
    roads = {
        "hub_policy": lambda: load_policy("me/evil", device="cpu"),
        "hub_policy_path": lambda: train(
            **small("act", dataset_id=data, policy_args=None), policy_path="me/evil", output_dir=str(tmp_path / "run")
        ),
        "hub_resume": lambda: train(resume_from_checkpoint="me/evil", output_dir=str(tmp_path / "run")),
        "policy_path": lambda: train(
            **small("act", dataset_id=data, policy_args=None), policy_path=str(folder), output_dir=str(tmp_path / "run")
        ),
        "resume": lambda: train(resume_from_checkpoint=str(folder), output_dir=str(tmp_path / "run")),
        "infer": lambda: infer.main([str(folder), "--dataset_id", data]),
        "evaluate": lambda: evaluate.main([str(folder), "--dataset_id", data, "--output_dir", str(tmp_path / "e")]),
        "serve": lambda: serve.main([str(folder), "--port", "0"]),
        "onnx": lambda: export.main([str(folder), str(tmp_path / "x.onnx"), "--format", "onnx"]),
        "lerobot": lambda: export.main([str(folder), str(tmp_path / "out"), "--format", "lerobot"]),
        "load_policy": lambda: load_policy(folder, device="cpu"),
        "lerobot_policy": lambda: load_policy(folder, device="cpu"),
        "lerobot_resume": lambda: train(resume_from_checkpoint=str(folder), output_dir=str(tmp_path / "run")),
    }
    try:
        assert roads[road]() == 2
        message = capsys.readouterr().err.strip().removeprefix("error: ")
    except UserError as error:
        message = str(error)
    assert "step 0 is refused: expected a processor step of LeRobot or of an installed plugin, got class" in message
    assert "\n" not in message


@pytest.mark.parametrize(("step", "why"), [
    ({"class": "planted.Step"}, "got class 'planted.Step', whose code is not run"),
    ({"class": "lerobot_policy_planted.Step"}, "whose code is not run"),  # no such package is installed
    ({"class": "lerobot.processor.pipeline.importlib.import_module", "config": {"name": "planted"}}, "got class"),
    ({"class": "lerobot.processor.pipeline.Path", "config": {}}, "got class"),
    ({"class": "os.system"}, "got class"), ({"class": ["planted"]}, "got class"), ({}, "got class None"),
    ({"registry_name": "planted"}, "expected a step that this LeRobot has, got registry_name 'planted'"),
    ({"registry_name": None, "class": "planted.Step"}, "got registry_name None"),
    ({"registry_name": ["planted"]}, "got registry_name"),
    ("planted", "expected an object"), (None, "expected an object"),
    ({"registry_name": "device_processor", "config": []}, "expected an object of settings"),
    ({"registry_name": "device_processor", "state_file": "../../x.safetensors"}, "expected a file in"),
    ({"registry_name": "device_processor", "state_file": "/etc/passwd"}, "expected a file in"),
    ({"registry_name": "device_processor", "state_file": 5}, "expected a file in"),
    ({"registry_name": "device_processor", "state_file": "gone.safetensors"}, "that is missing from"),
    ({"registry_name": "device_processor", "artifacts": {"x": "../x"}}, "expected a file in"),
])  # fmt: skip
def test_a_step_that_is_not_one_is_refused(planted, step, why):
    folder, _ = planted
    plant(folder, PIPELINES[0], step)
    with pytest.raises(UserError) as error:
        load_processors(folder, "cpu")
    assert why in str(error.value)
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    "content", ["", "[]", "5", '{"steps": {}}', '{"name": 1, "steps": []}', "{}", '{"steps": null}', "[" * 100_000]
)
@pytest.mark.parametrize("name", [*PIPELINES, "config.json"])
def test_a_file_of_another_form_is_one_line(planted, content, name):
    folder, _ = planted
    (folder / name).unlink()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}|holds a policy None"):
        load_policy(folder, device="cpu")


def test_steps_by_class_are_loaded_where_that_is_safe(planted, monkeypatch):
    """LeRobot's own, those of an installed plugin, and those of a module that the user's program has imported."""

    class Mine(ObservationProcessorStep):
        def observation(self, observation):
            return observation

        def transform_features(self, features):
            return features

    folder, _ = planted
    plant(folder, PIPELINES[0], {"class": "lerobot.processor.rename_processor.RenameObservationsProcessorStep"})
    monkeypatch.setitem(sys.modules, "my_steps", types.SimpleNamespace(Mine=Mine))
    plant(folder, PIPELINES[0], {"class": "my_steps.Mine"})
    before, _ = load_processors(folder, "cpu")
    assert isinstance(before.steps[0], Mine)
    assert type(before.steps[1]).__name__ == "RenameObservationsProcessorStep"


def test_an_installed_plugin_is_imported_for_its_steps(planted, tmp_path, monkeypatch):
    folder, _ = planted
    site = tmp_path / "site"
    (site / "lerobot_policy_arm-1.0.dist-info").mkdir(parents=True)
    (site / "lerobot_policy_arm-1.0.dist-info" / "METADATA").write_text("Name: lerobot_policy_arm\nVersion: 1.0\n")
    (site / "lerobot_policy_arm.py").write_text(
        "from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry\n"
        "class Named(ObservationProcessorStep):\n"
        "    def observation(self, observation): return observation\n"
        "    def transform_features(self, features): return features\n"
        "@ProcessorStepRegistry.register('arm_step')\n"
        "class Registered(Named): pass\n"
    )
    monkeypatch.syspath_prepend(site)
    plant(folder, PIPELINES[0], {"class": "lerobot_policy_arm.Named"})
    plant(folder, PIPELINES[1], {"registry_name": "arm_step"})
    before, after = load_processors(folder, "cpu")
    assert [type(pipeline.steps[0]).__name__ for pipeline in (before, after)] == ["Named", "Registered"]


def test_policy_types_are_names(planted):
    folder, _ = planted
    for name in ("planted.Step", ["act"], None, {"class": "planted"}, 5):
        edit(folder / "config.json", lambda config, name=name: config.update(type=name))
        with pytest.raises(UserError, match=r"holds a policy .*: expected one of act, "):
            load_policy_config(folder, None, "cpu")


@pytest.mark.parametrize(("change", "why"), [
    ({"megatron_config": {"x": 1}, "megatron_core": "planted"}, "expected no megatron_config"),
    ({"peft_type": "XLORA", "adapters": {"0": "/elsewhere"}}, "expected no adapters"),
    ({"base_model_name_or_path": None}, "expected the folder or Hub id of the adapted policy"),
    ({"base_model_name_or_path": {"class": "planted"}}, "expected the folder or Hub id of the adapted policy"),
])  # fmt: skip
def test_adapters_name_no_code(planted, trained, change, why):
    """PEFT imports `megatron_core`, and X-LoRA reads other folders."""
    folder, _ = planted
    config = {"peft_type": "LORA", "base_model_name_or_path": str(trained), "r": 4, "target_modules": ".*linear1"}
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    edit(folder / "config.json", lambda config: config.update(use_peft=True))
    with pytest.raises(UserError, match=why):
        load_policy(folder, device="cpu")


def test_adapters_in_a_pickle_are_not_read(planted, trained):
    peft = pytest.importorskip("peft", reason="peft is not installed (uv pip install peft)")
    folder, marker = planted
    config = {"peft_type": "LORA", "base_model_name_or_path": str(trained), "r": 4, "target_modules": ".*linear1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    edit(folder / "config.json", lambda config: config.update(use_peft=True))
    torch.save(Pickled(marker), folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors, the adapters' weights"):
        load_policy(folder, device="cpu")
    for kind in ("planted.Step", ["LORA"], None):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
        with pytest.raises(UserError, match="holds adapters of the kind"):
            base_model_of(folder)
    # what PEFT keeps of the base policy's class is not imported
    auto_mapping = {"base_model_class": "Step", "parent_library": "planted"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": auto_mapping}))
    adapted = peft.get_peft_model(
        load_policy(trained, device="cpu").policy, peft.LoraConfig(r=4, target_modules=".*linear1")
    )
    tensors = peft.get_peft_model_state_dict(adapted)
    save_file(tensors, folder / "adapter_model.safetensors")
    loaded = load_adapters(load_policy(trained, device="cpu").policy, folder)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in peft.get_peft_model_state_dict(loaded).items())
    # PEFT would drop what it does not know, and leave what is missing as it was made
    last = max(tensors)
    for changed, why in (
        (
            {name: tensor for name, tensor in tensors.items() if name != last},
            r"missing \['.*linear1.*'\], unexpected \[\]",
        ),
        ({**tensors, "more": torch.ones(2)}, r"missing \[\], unexpected \['more'\]"),
        ({}, "missing"),
        ({**tensors, last: tensors[last][:2].clone()}, "do not fit their settings: size mismatch"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=why):
            load_adapters(load_policy(trained, device="cpu").policy, folder)


class Pickled:
    """Writes the marker when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickles_are_not_run(planted, tmp_path):
    """In the optimizer's state, and under every name by which weights are pickled, beside the weights or in their place."""
    folder, marker = planted
    torch.save(Pickled(marker), folder / "optimizer_state.pth")
    for name in ("model.bin", "pytorch_model.bin", "policy.pt", "ema_state.pt", "adapter_model.bin"):
        torch.save(Pickled(marker), folder / name)
    index = {"metadata": {}, "weight_map": {"x": "../model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_policy(folder, device="cpu")
    with pytest.raises(UserError, match="is refused: expected tensors and numbers, got code that would run"):
        read_optimizer(folder)
    for name in ("model.safetensors", "policy.safetensors"):
        (folder / name).unlink()
        torch.save(Pickled(marker), folder / name)
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(folder, device="cpu")


def test_every_load_of_torchs_is_of_weights_only():
    for path in (ROOT / "src").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line}"
            assert "pickle.load" not in line, f"{path}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["act", "planted.Step"])
def test_an_old_policy_is_migrated_without_its_code(planted, made, tmp_path, monkeypatch, name):
    """LeRobot's migration runs in a process of its own: modules in the working folder, which may be the policy's, are none."""
    _, marker = planted
    settings = small("act", dataset_id=[str(made("front"))], steps=1)
    folder = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    weights = load_file(folder / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    for key, shape in (("observation_state", (3,)), ("observation_images_front", (3, 1, 1))):
        weights |= {f"normalize_inputs.buffer_{key}.{what}": torch.ones(shape) for what in ("mean", "std")}
    weights |= {f"unnormalize_outputs.buffer_action.{what}": torch.ones(3) for what in ("mean", "std")}
    save_file(weights, old / "model.safetensors")
    shutil.copy(folder / "config.json", old / "config.json")
    for module in ("json", "torch", "lerobot", "draccus", "trust"):
        (old / f"{module}.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    if name != "act":
        edit(old / "config.json", lambda config: config.update(type=name))
    monkeypatch.chdir(old)
    if name == "act":
        migrate(old, tmp_path / "migrated")
        assert (tmp_path / "migrated" / PIPELINES[0]).is_file()
    else:
        with pytest.raises(UserError, match="LeRobot's migration fails"):
            migrate(old, tmp_path / "migrated")


@pytest.fixture
def transformers_stub(monkeypatch):
    """transformers' search for a repo's Python files, where transformers itself need not be installed."""
    module = types.ModuleType("transformers.dynamic_module_utils")
    module.cached_file = lambda repo, name, **options: f"{repo}/{name}"
    module.TIME_OUT_REMOTE_CODE = 15
    package = types.ModuleType("transformers")
    package.dynamic_module_utils = module
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.dynamic_module_utils", module)
    return module


def test_python_files_of_a_tokenizer_are_not_run(transformers_stub, monkeypatch):
    """Whoever asks for them, unless LeRobot names that repo by itself or the user trusts it."""
    find = transformers_stub.cached_file

    def ask(repo):
        with trust.no_remote_code("FOLDER"):
            assert transformers_stub.TIME_OUT_REMOTE_CODE == 0  # transformers asks no terminal
            try:
                return transformers_stub.cached_file(repo, "tokenizer.py")
            except ValueError as error:  # as LeRobot wraps what a step's constructor raises
                raise ValueError("Failed to instantiate processor step") from error

    with pytest.raises(
        UserError, match=r"FOLDER is refused: it asks to run the Python files of me/evil. If you trust them, set "
    ):
        ask("me/evil")
    with pytest.raises(UserError, match="the Python files of /tmp/evil"):
        ask("/tmp/evil")
    assert ask("lerobot/fast-action-tokenizer") == "lerobot/fast-action-tokenizer/tokenizer.py"
    monkeypatch.setenv(trust.TRUSTED, "you/other,me/evil")
    assert ask("me/evil") == "me/evil/tokenizer.py"
    assert transformers_stub.cached_file is find
    assert transformers_stub.TIME_OUT_REMOTE_CODE == 15


def test_a_folder_named_as_lerobots_repo_is_not_it(transformers_stub, tmp_path, monkeypatch):
    (tmp_path / "lerobot" / "fast-action-tokenizer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refused = pytest.raises(UserError, match="the Python files of lerobot/fast-action-tokenizer")
    with refused, trust.no_remote_code("FOLDER"):
        transformers_stub.cached_file("lerobot/fast-action-tokenizer", "tokenizer.py")


def test_a_tokenizer_that_is_loaded_late_is_loaded_where_code_is_refused(planted, transformers_stub, monkeypatch):
    """As groot's step does, at its first batch."""
    monkeypatch.setattr(ProcessorStepRegistry, "_registry", dict(ProcessorStepRegistry._registry))

    @ProcessorStepRegistry.register("late_step")
    class Late(ObservationProcessorStep):
        @property
        def proc(self):
            return transformers_stub.cached_file("me/evil", "tokenizer.py")

        def observation(self, observation):
            return observation

        def transform_features(self, features):
            return features

    folder, _ = planted
    plant(folder, PIPELINES[1], {"registry_name": "late_step"})
    with pytest.raises(UserError, match="it asks to run the Python files of me/evil"):
        load_processors(folder, "cpu")


def evil_tokenizer(folder: Path, marker: Path) -> Path:
    """A tokenizer's folder with Python files of its own, which every one of its JSON files names."""
    folder.mkdir()
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor")
    auto_map = dict.fromkeys(names, "evil.Evil")
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    content = json.dumps({"auto_map": auto_map, "model_type": "evil"})
    for name in ("config", "tokenizer_config", "processor_config", "preprocessor_config", "generation_config"):
        (folder / f"{name}.json").write_text(content)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    return folder


@pytest.mark.parametrize("step", [
    {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": "EVIL"}},
    {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": "EVIL", "trust_remote_code": True}},
    {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": "EVIL",
                                                              "paligemma_tokenizer_name": "EVIL"}},
    {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "EVIL"}},
    {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "x"}, "artifacts": {"tokenizer_name": "tokenizer"}},
])  # fmt: skip
def test_tokenizers_with_code(planted, tmp_path, step, monkeypatch):
    """The real transformers, which runs `trust_remote_code` of LeRobot's steps, and asks the terminal for others."""
    pytest.importorskip("transformers", reason="transformers is not installed (uv pip install 'lerobot[pi]==0.6.1')")
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    folder, marker = planted
    evil = evil_tokenizer(folder / "tokenizer", marker)
    config = {key: str(evil) if value == "EVIL" else value for key, value in step["config"].items()}
    plant(folder, PIPELINES[0], {**step, "config": config})
    with pytest.raises(UserError, match=r"is refused: (it asks to run the Python files of|a repo that it names has)"):
        load_processors(folder, "cpu")


def test_environments_of_the_hub_are_not_run(monkeypatch):
    """A checkpoint's settings may name one."""
    from lerobot.envs import EnvConfig

    hubs = [name for name, kind in EnvConfig.get_known_choices().items() if getattr(kind, "hub_path", None)]
    assert hubs
    for name in hubs:
        with pytest.raises(UserError, match=r"is a Python file of the Hub repo .*, which is not run"):
            open_simulation(name)


def test_a_policy_of_another_version_is_one_line(planted):
    """Unknown and mistyped fields of config.json name the field, in one line."""
    folder, _ = planted
    good = (folder / "config.json").read_text()
    wrong = [
        ({"chunk_sizes": 4}, "has no 'chunk_sizes'. Install the version"),
        ({"a": 1, "b": 2}, "has no 'a', 'b'"),
        ({"chunk_size": None}, "chunk_size of policy act in lerobot .*: expected int, got None"),
        ({"chunk_size": "many"}, "chunk_size .* expected int, got 'many'"),
        ({"chunk_size": 4.5}, "chunk_size .* expected int, got 4.5"),
        ({"n_encoder_layers": "9" * 500}, "n_encoder_layers .* expected int, got '9"),
        ({"chunk_size": True}, "chunk_size .* expected int, got True"),
        ({"dropout": []}, "dropout .* expected float"),
        ({"use_vae": "maybe"}, "use_vae .* expected bool"),
        ({"vision_backbone": 18}, "vision_backbone .* expected str"),
        ({"vision_backbone": "planted"}, "policy act refuses its values: .*planted"),
        ({"input_features": 5}, "input_features .* expected"),
        ({"input_features": {"observation.state": 5}}, "input_features .* expected"),
        ({"input_features": {"observation.state": {"type": "STATES", "shape": [3]}}}, "input_features .* expected"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": []}}}, "sizes of 1 or more as shape"),
        ({"output_features": {"action": {"type": "ACTION", "shape": [-3]}}}, "sizes of 1 or more as shape"),
        ({"output_features": {"action": {"type": "ACTION", "shape": ["3x"]}}}, "output_features .* expected"),
        ({"input_features": {"observation.image": {"type": "VISUAL", "shape": [3]}}}, "channels, height and width"),
        ({"normalization_mapping": {"STATE": "MEAN"}}, "normalization_mapping .* expected"),
        ({"n_action_steps": 400}, "policy act refuses its values"),
        ({"dim_model": 33}, "dim_model|n_heads"),
    ]
    for change, why in wrong:
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(UserError, match=why) as error:
            load_policy_config(folder, None, "cpu")
        assert "\n" not in str(error.value)


def test_a_good_policy_still_acts(trained):
    assert load_policy(trained, device="cpu").act({"observation.state": np.zeros(3)}).shape == (3,)


def put(kind: str, path: Path) -> None:
    """Something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("gone")
    else:
        os.mkfifo(path)


NOT_FILES = {"folder": "a folder", "link": "a link to nothing", "pipe": "a pipe, a socket or a device"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on Windows")
@pytest.mark.parametrize("kind", NOT_FILES)
def test_only_files_are_read(trained, made, tmp_path, kind):
    """Reading a pipe waits for ever. A pipeline that is a folder or a dangling link looked like none: new ones were made."""
    names = sorted(path.name for path in trained.iterdir() if path.suffix in (".json", ".safetensors", ".pth"))
    names += ["adapter_config.json", "model.safetensors.index.json"]
    for number, name in enumerate(names):
        folder = Path(shutil.copytree(trained, tmp_path / str(number) / trained.name))
        put(kind, folder / name)
        with pytest.raises(
            UserError, match=rf"{name} is (missing|{NOT_FILES[kind]})|{name} is not listed|not a complete"
        ):
            train(resume_from_checkpoint=str(folder))
        if name != "manifest.json":
            (folder / "manifest.json").unlink()
        expected = rf"{name} cannot be read: expected a file, got {NOT_FILES[kind]}"
        with pytest.raises(UserError, match=expected):
            load_policy(folder, device="cpu")
        settings = small("act", dataset_id=str(made("no_camera")), policy_args=None, output_dir=str(tmp_path / "run"))
        with pytest.raises(UserError, match=expected):
            train(**settings, policy_path=str(folder))
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on Windows")
def test_pipes_in_a_checkpoint_of_lerobot_and_in_a_tokenizers_folder(trained, tmp_path):
    theirs = to_lerobot(trained, tmp_path / "theirs")
    plant(theirs / "pretrained_model", PIPELINES[0], {"registry_name": "device_processor", "artifacts": {"x": "words"}})
    (theirs / "pretrained_model" / "words").mkdir()
    put("pipe", theirs / "pretrained_model" / "words" / "vocab.txt")
    with pytest.raises(UserError, match=r"vocab\.txt cannot be read: expected a file, got a pipe"):
        load_policy(theirs, device="cpu")
    put("pipe", theirs / "training_state" / "optimizer_state.safetensors")
    with pytest.raises(UserError, match=r"optimizer_state\.safetensors cannot be read: expected a file, got a pipe"):
        train(resume_from_checkpoint=str(theirs), output_dir=str(tmp_path / "run"))


def test_one_of_the_two_pipelines_is_no_policy_without_processors(planted, made, tmp_path):
    folder, _ = planted
    (folder / PIPELINES[1]).unlink()
    settings = small("act", dataset_id=str(made("no_camera")), policy_args=None, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"has no {PIPELINES[1]}, one of the policy's two pipelines"):
        train(**settings, policy_path=str(folder))


def configured(folder: Path, **change) -> None:
    edit(folder / "config.json", lambda config: config.update(change))


@pytest.mark.parametrize("value", [10**5, 10**7, 10**15, 10**30, 3.2e10])
@pytest.mark.parametrize("name", ["chunk_size", "n_encoder_layers", "dim_model", "dim_feedforward", "latent_dim"])
def test_sizes_far_from_those_of_the_weights(planted, name, value):
    """Refused before anything of that size is made, or looped over."""
    folder, _ = planted
    configured(folder, **{name: value})
    with pytest.raises(
        UserError,
        match=rf"{name} of policy act .*(or less|int), got|of the size of .*model\.safetensors, got|does not fit policy",
    ):
        load_policy(folder, device="cpu")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_act(planted, number):
    folder, _ = planted
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = number
    save_file(tensors, folder / "model.safetensors")
    (folder / "policy.safetensors").unlink()
    with pytest.raises(UserError, match=rf"expected finite weights, got NaN or infinity in {name}"):
        load_policy(folder, device="cpu")


@pytest.mark.parametrize("size", [10**8, 10**12, 10**30])
def test_features_of_impossible_sizes(planted, size):
    folder, _ = planted
    configured(folder, input_features={"observation.state": {"type": "STATE", "shape": [size]}})
    with pytest.raises(UserError, match=r"numbers or fewer as shape|or less, got|the size of"):
        load_policy(folder, device="cpu")


@pytest.mark.parametrize("pair", [
    "dim_model=32000000000", "dim_model=100000000", "dim_feedforward=900000000", "n_encoder_layers=1000000000",
    "n_encoder_layers=10000", "chunk_size=1000000000", "latent_dim=1000000000"])  # fmt: skip
def test_sizes_on_the_command_line(made, tmp_path, pair):
    settings = small("act", dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"))
    settings["policy_args"] = [*settings["policy_args"], pair]
    with pytest.raises(
        UserError, match=r"expected \d+ or less, got|does not fit in the .* GB of memory of this machine|GB are free"
    ):
        train(**settings)


def test_the_limit_of_sizes_changes_no_weight():
    from policy.limits import SizeLimit

    def values():
        torch.manual_seed(0)
        return [torch.nn.Linear(3, 4).weight, torch.randn(2, 3), torch.rand(()), torch.zeros(2, 3), torch.arange(3.0),
                torch.full((2,), 1.5), torch.linspace(0, 1, 3), torch.eye(2)]  # fmt: skip

    with SizeLimit("a policy", None) as limit:
        limited = values()
    assert limit.count >= 7
    assert all(torch.equal(value, other) for value, other in zip(limited, values(), strict=True))


@pytest.mark.parametrize(("change", "why"), [
    ({"dropout": float("nan")}, "dropout of policy act .*expected a finite number"),
    ({"kl_weight": float("inf")}, "kl_weight of policy act .*expected a finite number"),
    ({"dropout": 1e8}, "dropout"),
    ({"temporal_ensemble_coeff": 0.01, "n_action_steps": 2}, "temporal"),
    ({"output_features": {}}, "without observations or without an action"),
    ({"output_features": None}, "without observations or without an action"),
    ({"input_features": {}}, "without observations or without an action"),
    ({"output_features": {"x": {"type": "ACTION", "shape": [3]}}}, "without observations or without an action"),
])  # fmt: skip
def test_values_that_a_policy_cannot_act_with(planted, change, why):
    folder, _ = planted
    configured(folder, **change)
    with pytest.raises(UserError, match=why) as error:
        load_policy(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_a_backbone_in_a_pickle_is_one_line(monkeypatch):
    def build(*arguments, **options):
        raise pickle.UnpicklingError("Weights only load failed.\n\n" + "Re-running `torch.load` is dangerous.\n" * 50)

    monkeypatch.setattr("policy.factory.get_policy_class", lambda name: build)
    with pytest.raises(UserError, match=r"policy act: Weights only load failed") as error:
        build_policy(policy_config("act", None, "cpu"), None)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("step", "why"), [
    ({"registry_name": "rename_observations_processor", "config": {"rename_map": 5}}, "expected dict.* as rename_map, got 5"),
    ({"registry_name": "rename_observations_processor", "config": {"rename_map": {"a": 5}}}, "as rename_map"),
    ({"registry_name": "rename_observations_processor", "config": {"rename_map": None}}, "as rename_map, got None"),
    ({"registry_name": "time_limit_processor", "config": {"max_episode_steps": "9"}}, "expected int as max_episode_steps"),
    ({"registry_name": "device_processor", "config": {"float_dtype": 16}}, "as float_dtype, got 16"),
    ({"registry_name": "image_crop_resize_processor", "config": {"resize_size": [8, 8, 8]}}, "as resize_size"),
    ({"registry_name": "image_crop_resize_processor", "config": {"resize_size": [10**6, 8]}}, "as resize_size"),
    ({"registry_name": "normalizer_processor", "config": {"features": {"observation.state": 5}, "norm_map": {}}}, "as features"),
    ({"registry_name": "normalizer_processor", "config": {"features": {}, "norm_map": {"STATE": "X"}}}, "as norm_map"),
    ({"registry_name": "normalizer_processor", "config": {"features": {}, "norm_map": {}, "eps": float("nan")}}, "as eps"),
    ({"registry_name": "device_processor", "state_file": "x" * 5000}, "cannot be opened: File name too long"),
    ({"registry_name": "device_processor", "artifacts": {"x": "x" * 5000}}, "cannot be opened: File name too long"),
    ({"registry_name": "rename_observations_processor", "config": {"rename_map": {"observation.state": "observation.gone"}}},
     "fail on an observation of the policy's features: KeyError: 'observation.state'"),
    ({"registry_name": "map_tensor_to_delta_action_dict"}, "fail on an observation of the policy's features"),
    ({"registry_name": "torch2numpy_action_processor"}, "fail on an observation of the policy's features"),
])  # fmt: skip
def test_settings_of_steps_that_fail_when_they_run(planted, made, tmp_path, step, why):
    folder, _ = planted
    plant(folder, PIPELINES[0], step)
    settings = small("act", dataset_id=str(made("no_camera")), policy_args=None, output_dir=str(tmp_path / "run"))
    for use in (lambda: load_policy(folder, device="cpu"), lambda: train(**settings, policy_path=str(folder))):
        with pytest.raises(UserError, match=why) as error:
            use()
        assert "\n" not in str(error.value)


def test_a_step_whose_types_are_of_a_missing_package_is_not_compared(tmp_path):
    importlib.import_module("lerobot.policies.eo1.processor_eo1")  # without transformers, it declares a `None | None`
    check_step_settings([{"registry_name": "eo1_qwen_processor", "config": {"processor_name": "a"}}], tmp_path)


@pytest.mark.parametrize("step", [
    {"registry_name": "torch2numpy_action_processor"},
    {"registry_name": "map_tensor_to_delta_action_dict", "config": {"use_gripper": False}},
])  # fmt: skip
def test_a_postprocessor_that_gives_no_action(planted, step):
    folder, _ = planted
    plant(folder, PIPELINES[1], step)
    with pytest.raises(
        UserError, match="fail on an observation of the policy's features: ValueError: Action should be a PolicyAction"
    ):
        load_policy(folder, device="cpu")


@pytest.mark.parametrize(("change", "why"), [
    ({"optimizer_weight_decay": -0.1}, "policy act: its optimizer: Invalid weight_decay value: -0.1"),
    ({"optimizer_lr": -1}, "policy act: its optimizer: Invalid learning rate: -1"),
])  # fmt: skip
def test_presets_that_an_optimizer_refuses(planted, made, tmp_path, change, why):
    folder, _ = planted
    configured(folder, **change)
    settings = small(
        "act", dataset_id=str(made("no_camera")), policy_args=None, output_dir=str(tmp_path / "run"), lr=None
    )
    with pytest.raises(UserError, match=why):
        train(**settings, policy_path=str(folder))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
