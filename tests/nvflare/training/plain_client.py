"""A client script as NVFlare's tutorials have it, which knows nothing of this package.

It trains, tells a tracker, evaluates a model that it is sent, and submits its own.
"""

import nvflare.client as flare
from nvflare.client.tracking import SummaryWriter

KEY = "numpy_key"


def main() -> None:
    flare.init()
    writer = SummaryWriter()
    weights = None
    while flare.is_running():
        received = flare.receive()
        if flare.is_train():
            weights = received.params[KEY] + 1
            mean = float(weights.mean())
            writer.add_scalar("weight_mean", mean, received.current_round)
            flare.send(
                flare.FLModel(
                    params={KEY: weights},
                    metrics={"weight_mean": mean},
                    meta={"NUM_STEPS_CURRENT_ROUND": 2},
                    current_round=received.current_round,
                )
            )
        elif flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"weight_mean": float(received.params[KEY].mean())}))
        elif flare.is_submit_model():
            flare.send(flare.FLModel(params={KEY: weights}))


if __name__ == "__main__":
    main()
