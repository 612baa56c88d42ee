"""A pair as one model of Triton Inference Server's Python backend. Not run here: Triton is no Python package."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils  # of the server

import elang


class TritonPythonModel:
    def initialize(self, args):
        parameters = {name: v["string_value"] for name, v in json.loads(args["model_config"])["parameters"].items()}
        kind, number = args["model_instance_kind"], args["model_instance_device_id"]
        self.classify = elang.pipeline(
            "text-classification",
            swift=parameters["swift"],
            super=parameters["super"],
            router=parameters["calibration"],
            device=f"cuda:{number}" if kind == "GPU" else None,
            batch_size=64,
        )

    def execute(self, requests):
        """The requests that the server's dynamic batcher brings together are one batch; each gets its own answers."""
        texts = [
            [text.decode() for text in pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().reshape(-1)]
            for request in requests
        ]
        answers = iter(self.classify([text for of_request in texts for text in of_request]))
        responses = []
        for of_request in texts:
            mine = [next(answers) for _ in of_request]
            columns = {
                "LABEL": np.array([[answer["label"]] for answer in mine], dtype=object),
                "MODEL": np.array([[answer["model"]] for answer in mine], dtype=object),
                "SCORE": np.array([[answer["score"]] for answer in mine], dtype=np.float32),
            }
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(*column) for column in columns.items()]))
        return responses
