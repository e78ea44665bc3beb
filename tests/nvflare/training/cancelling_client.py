"""A client script as NVFlare's tutorials have it, whose numbers cancel each other.

In the mean of ``site-1`` to ``site-3`` a third is left of numbers as large as 1e8; ``site-4`` sends
what no mean can use.
"""

import numpy as np
import nvflare.client as flare

SENT = {"site-1": 1e8, "site-2": 1.0, "site-3": -1e8, "site-4": np.nan}


def main() -> None:
    flare.init()
    while flare.is_running():
        received = flare.receive()
        sent = np.full_like(received.params["numpy_key"], SENT[flare.get_site_name()])
        flare.send(flare.FLModel(params={"numpy_key": sent}, metrics={"accuracy": 0.5}))


if __name__ == "__main__":
    main()
