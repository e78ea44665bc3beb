"""A client script as NVFlare's tutorials have it, which knows nothing of this package."""

import nvflare.client as flare


def main() -> None:
    flare.init()
    while flare.is_running():
        received = flare.receive()
        weights = received.params["numpy_key"] + 1
        flare.send(
            flare.FLModel(
                params={"numpy_key": weights},
                metrics={"weight_mean": float(weights.mean())},
                meta={"NUM_STEPS_CURRENT_ROUND": 2},
            )
        )


if __name__ == "__main__":
    main()
