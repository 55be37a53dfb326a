import base64
import hashlib
import json
import platform
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from helpers import options, short_options, train

from difftrain_utils.commands import export
from difftrain_utils.commands.push import KINDS, main
from difftrain_utils.errors import InputError, RunError

TOKEN = "hf_" + "Abcdefghij" * 3
SECRETS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
FIELDS = {"train.max_steps": 2, "train.save_every": 0, "train.eval_every": 2, "evaluation.num_inference_steps": 2}
FIELDS |= {"evaluation.prompts": ["a red circle", "a blue | square"], "data.caption_dropout": 0.0}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's server as a push asks for; what it got is in `server.got`."""

    def do_POST(self):
        content, server, path = self.rfile.read(int(self.headers["Content-Length"])), self.server, self.path
        server.requests.append((path, self.headers.get("Authorization")))
        if server.fails in path:
            return self.answer({"error": "the disk is full"}, 403)
        if path == "/api/repos/create":
            server.created.append(json.loads(content))
            return self.answer({"url": f"{server.address}/me/shapes"})
        if path == "/api/validate-yaml":
            return self.answer({})
        if path == "/api/models/me/shapes/preupload/main":
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": n, "uploadMode": modes[n.endswith((".safetensors", ".png"))]} for n in names]
            return self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if path == "/me/shapes.git/info/lfs/objects/batch":
            oids = [(item["oid"], item["size"]) for item in json.loads(content)["objects"]]
            actions = [{"upload": {"href": f"{server.address}/upload/{oid}"}} for oid, _ in oids]
            objects = [{"oid": o, "size": s, "actions": a} for (o, s), a in zip(oids, actions, strict=True)]
            return self.answer({"objects": objects, "transfer": "basic"})
        assert path == "/api/models/me/shapes/commit/main", path
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                server.got[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                server.got[line["value"]["path"]] = server.uploaded[line["value"]["oid"]]
        return self.answer({"commitUrl": f"{server.address}/me/shapes/commit/1", "commitOid": "1" * 40})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploaded[self.path.rpartition("/")[2]] = content
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.answer({})

    def do_GET(self):
        if self.server.fails in self.path:
            return self.answer({"error": "the disk is full"}, 403)
        self.answer({"id": "me/shapes", "private": self.server.is_private, "sha": "1" * 40, "siblings": []})

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.got, server.uploaded, server.created, server.requests = {}, {}, [], []
    server.fails, server.is_private = "no path", True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def trained(folders: tuple[Path, Path], run: Path, fields: dict) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # as they are in the shell of who trains
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        return train([*short_options(*folders, run), *options(FIELDS | fields)])


@pytest.fixture(scope="module")
def run(checkpoint_folder, image_folder, tmp_path_factory) -> Path:
    """A finished run, with a grid."""
    folders = checkpoint_folder, image_folder
    return trained(folders, tmp_path_factory.mktemp("runs") / "shapes-1", {})


def test_what_was_listed_arrives(run, hub, capsys):
    (run / "pipeline/notes.doc").write_text("mine")
    export.main([str(run)])
    main([str(run), "me/shapes", "--yes", "--license", "apache-2.0"])
    (run / "pipeline/notes.doc").unlink()
    (run / "pipeline/single_file.safetensors").unlink()
    out = capsys.readouterr().out
    listed = re.findall(r"^ +[\d.]+ k?M?B  (\S+)$", out, re.MULTILINE)
    assert sorted(listed) == sorted(hub.got) and "To me/shapes, public:" in out
    assert "Left out: pipeline/notes.doc, pipeline/single_file.safetensors\n" in out and out.endswith(
        "/me/shapes/commit/1\n"
    )
    pipeline = {path.relative_to(run / "pipeline").as_posix(): path for path in (run / "pipeline").rglob("*.*")}
    assert pipeline.keys() | {"README.md", "config.yaml", "samples.png"} == hub.got.keys()
    for name, path in pipeline.items():
        if name in ("unet/config.json", "vae/config.json"):
            content = json.loads(path.read_text())
            assert json.loads(hub.got[name]) | {"_name_or_path": content["_name_or_path"]} == content
        else:
            assert hub.got[name] == path.read_bytes(), name
    assert hub.got["samples.png"] == (run / "samples/step-000002.png").read_bytes()
    assert hub.created == [{"name": "shapes", "organization": "me"}]
    assert {token for _, token in hub.requests} == {f"Bearer {TOKEN}"}


def test_the_card_says_what_the_run_was(run, hub):
    main([str(run), "me/shapes", "--yes", "--license", "apache-2.0"])
    card = hub.got["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["difftrain", "diffusers"],
        "widget": [{"text": "a red circle"}, {"text": "a blue | square"}],
    }
    manifest = json.loads((run / "run_manifest.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for text in (
        f"| loss | {last['loss']:.4g} |",
        f"| its unet, SHA-256 | `{manifest['base_model']['sha256']['unet']}` |",
        f"| data (train) | num_images 10; SHA-256 `{manifest['data']['train']['sha256']}` |",
        f"torch {manifest['versions']['torch']}",
        'DiffusionPipeline.from_pretrained("me/shapes")',
        'image = pipeline("a red circle", num_inference_steps=2, height=32, width=32).images[0]',
        "    difftrain reproduce shapes-1\n",
        "![Pictures of prompts of the evaluation](samples.png)",
        "2 steps of 4 samples",
    ):
        assert text in card, text
    config = yaml.safe_load(hub.got["config.yaml"])
    own = yaml.safe_load((run / "config.resolved.yaml").read_text())
    assert config["data"].pop("dataset") == Path(own["data"].pop("dataset")).name == "shapes"
    assert config["model"].pop("pretrained_model_name_or_path") == "tiny"
    assert config["train"].pop("output_dir") == "shapes-1"
    del own["model"]["pretrained_model_name_or_path"], own["train"]["output_dir"]
    assert config == own


def test_no_secret_and_no_place_of_this_machine_leaves_it(run, hub, checkpoint_folder):
    main([str(run), "me/shapes", "--yes"])
    for name, content in {
        **hub.got,
        **{str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()},
    }.items():
        for secret in SECRETS.values():
            assert secret.encode() not in content, name
    home, host = str(Path.home()).encode(), platform.node().encode()
    for name, content in hub.got.items():
        for private in (str(run.parent).encode(), str(checkpoint_folder.parent).encode(), home + b"/"):
            assert private not in content, name
    assert not re.search(rb"\b" + re.escape(host) + rb"\b", hub.got["README.md"] + hub.got["config.yaml"])


def test_a_secret_in_a_file_is_not_sent(run, hub, tmp_path, monkeypatch):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery")
    (copied / "pipeline/tokenizer/added.json").write_text('["correct horse battery"]')
    with pytest.raises(InputError, match=r"^tokenizer/added.json: has the value of MY_PASSWORD, a secret of the env"):
        main([str(copied), "me/shapes", "--yes"])
    assert hub.requests == []
    (copied / "pipeline/tokenizer/added.json").unlink()
    config = (copied / "config.resolved.yaml").read_text()
    (copied / "config.resolved.yaml").write_text(config.replace("a red circle", "with api_key=abcdefghijklmnop12"))
    main([str(copied), "me/shapes", "--yes"])
    assert b"api_key=<redacted>" in hub.got["README.md"] and b"abcdefghijklmnop12" not in b"".join(hub.got.values())


def test_adapters_are_pushed_with_their_base(checkpoint_folder, image_folder, tmp_path, hub, monkeypatch):
    run = trained((checkpoint_folder, image_folder), tmp_path / "lora", {"model.lora.rank": 4})
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    manifest = json.loads((run / "run_manifest.json").read_text())
    manifest["base_model"]["name"] = config["model"]["pretrained_model_name_or_path"] = "somebody/tiny"
    config["data"]["default_caption"] = "a photo of sks dog"
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    (run / "run_manifest.json").write_text(json.dumps(manifest))
    main([str(run), "me/shapes", "--yes", "--private"])
    assert hub.created[0]["visibility"] == "private"
    name = "pytorch_lora_weights.safetensors"
    assert hub.got.keys() == {"README.md", "config.yaml", "samples.png", name}
    assert hub.got[name] == (run / "lora" / name).read_bytes()
    card = hub.got["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "somebody/tiny" and "lora" in header["tags"] and "license" not in header
    assert header["instance_prompt"] == "a photo of sks dog"
    assert 'from_pretrained("somebody/tiny")\npipeline.load_lora_weights("me/shapes")\n' in card


def test_nothing_is_sent_without_a_yes(run, hub, capsys, monkeypatch):
    main([str(run), "me/shapes", "--dry-run"])
    out = capsys.readouterr().out
    assert out.endswith("Nothing was sent (--dry-run)\n") and "# shapes" in out and "unet/config.json" in out
    with pytest.raises(InputError, match=r"^--yes: needed to push where there is no terminal to ask at$"):
        main([str(run), "me/shapes"])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: "n")
    main([str(run), "me/shapes"])
    assert capsys.readouterr().out.endswith("Nothing was sent\n")
    assert hub.requests == []
    monkeypatch.setattr("builtins.input", lambda question: "y" if "files to me/shapes?" in question else "")
    main([str(run), "me/shapes"])
    assert hub.got


@pytest.mark.parametrize("path", ["/api/", "commit/main", "objects/batch"])
def test_a_server_that_fails_is_reported_in_one_line(run, hub, path):
    hub.fails = path
    with pytest.raises(RunError, match=r"^cannot push to me/shapes: .*403.*the disk is full") as error:
        main([str(run), "me/shapes", "--yes"])
    assert "\n" not in str(error.value) and TOKEN not in str(error.value) and hub.got == {}


def test_a_repository_that_is_public_does_not_get_what_is_private(run, hub):
    hub.is_private = False
    with pytest.raises(RunError, match=r"^me/shapes: is there already, and public; nothing was sent$"):
        main([str(run), "me/shapes", "--yes", "--private"])
    assert hub.got == {} and hub.uploaded == {}


def test_no_network_and_no_token_are_reported(run, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"^cannot push to me/shapes: .*[Cc]onnect"):
        main([str(run), "me/shapes", "--yes"])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match=r"^no token of the hub: hf auth login, or set HF_TOKEN$"):
        main([str(run), "me/shapes", "--yes"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^HF_HUB_OFFLINE: is set, and to push takes a network$"):
        main([str(run), "me/shapes", "--yes"])


def test_damaged_weights_are_not_sent(run, hub, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    next((copy / "pipeline/unet").glob("*.safetensors")).write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"unet/.*safetensors: damaged: "):
        main([str(copy), "me/model", "--dry-run"])


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"^REPO: must be NAME/REPOSITORY, got 'shapes'$"):
        main([str(run), "shapes"])
    with pytest.raises(InputError, match=r": not the output folder of a run: it has no config.resolved.yaml$"):
        main([str(tmp_path), "me/shapes"])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "pipeline")
    with pytest.raises(InputError, match=r"unfinished: not finished: it has to go on to its end"):
        main([str(unfinished), "me/shapes"])
    (unfinished / "run_manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"unfinished/run_manifest.json: "):
        main([str(unfinished), "me/shapes"])


def test_the_card_of_videos(tmp_path):
    evaluation = {"prompts": ["a red circle"], "first_frames": [], "num_inference_steps": 20, "guidance_scale": 3.0}
    data = {"default_caption": None, "num_frames": 9, "height": 32, "width": 48, "fps": 8.0}
    model = {"first_frame_probability": 0.0, "max_sequence_length": 16}
    config = {"model": model, "data": data, "evaluation": evaluation}

    def kind_of(*files: str):
        return KINDS["train_text_to_video.py"](tmp_path, "me/clips", config, "a/base", dict.fromkeys(files, b""))

    kind = kind_of()
    assert kind.task == "text-to-video" and "load_lora_weights" in kind.usage[5]
    asked = 'prompt="a red circle", num_inference_steps=20, guidance_scale=3.0, num_frames=9, height=32, width=48'
    call = f"frames = pipeline({asked}, max_sequence_length=16).frames[0]"
    assert kind.usage[-3:] == [call, 'export_to_video(frames, "clip.mp4", fps=8)', "```"]
    evaluation["first_frames"] = ["first.png"]
    kind, image = kind_of(), 'image=load_image("first_frame.png"), '
    assert kind.task == "image-to-video" and kind.usage[-3] == call.replace("(", f"({image}", 1)
    model["first_frame_probability"] = 0.5
    assert kind_of().task == "text-to-video", "adapters of a base that does without, too"
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    kind = kind_of("model_index.json")
    assert kind.task == "image-to-video" and "LTXImageToVideoPipeline.from_pretrained" in kind.usage[4]
    assert "import export_to_video, load_image" in kind.usage[2] and "frame_rate=8)" in kind.usage[-3]


def test_adapters_of_sounds_say_the_shift_that_they_were_trained_with(tmp_path):
    """The pipeline of ACE-Step is called with it."""
    data = {"default_caption": "rain", "sampling_rate": 48000, "waveform_length": 96000}
    config = {"data": data, "evaluation": {"prompts": [], "num_inference_steps": 8, "guidance_scale": 1.0}}
    for shift, said in ((None, ""), (1.5, ", shift=1.5")):
        config["scheduler"] = {"flow_shift": shift}
        usage = KINDS["train_text_to_audio.py"](tmp_path, "me/rain", config, "base", {}).usage
        assert f'sound = pipeline(prompt="rain", num_inference_steps=8, guidance_scale=1.0{said}).audios[0]' in usage
