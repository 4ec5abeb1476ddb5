"""What runs inside each TensorRT-LLM worker of a rollout server: reload the weights from a folder. [tensorrt_llm >= 1.2]

Written from the sources named in docs/engines.md; never run by this project.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from tensorrt_llm.llmapi.rlhf_utils import WorkerExtension


class FolderExtension(WorkerExtension):
    """Reached through ``AsyncLLM.collective_rpc("load_folder", ...)``."""

    def load_folder(self, folder: str) -> tuple[int, int]:
        """Replace all weights by those of a Hugging Face folder, file by file; number of tensors and bytes."""
        model = self.engine.model_engine.model
        loader = self.engine.model_engine.model_loader
        tensors = size = 0
        with self.engine.control_action():
            for module in model.modules():
                if hasattr(module, "pre_reload_weights"):
                    module.pre_reload_weights()
            for file in sorted(Path(folder).glob("*.safetensors")):
                weights = load_file(file)
                loader.reload(model, weights, allow_partial_loading=True)
                tensors += len(weights)
                size += sum(t.numel() * t.element_size() for t in weights.values())
            for module in model.modules():
                for name in ("process_weights_after_loading", "post_load_weights"):
                    if hasattr(module, name):
                        getattr(module, name)()
            self.engine.reset_prefix_cache()
        if not tensors:
            raise ValueError(f"{folder}: no *.safetensors")
        return tensors, size
