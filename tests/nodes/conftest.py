import comfy.model_management as mm
import folder_paths
import pytest
import torch


@pytest.fixture(autouse=True)
def comfyui(tmp_path, monkeypatch):
    """Empty model folders, nothing loaded, and inference mode, as ComfyUI runs every node."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "text_encoders").mkdir()
    folders = {"diffusers": [str(tmp_path / "diffusers")], "text_encoders": [str(tmp_path / "text_encoders")]}
    monkeypatch.setattr(folder_paths, "folders", folders)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(mm, "loaded", [])
    monkeypatch.delenv("QUANTIZED_DIFFUSERS_STORE", raising=False)
    with torch.inference_mode():
        yield tmp_path
