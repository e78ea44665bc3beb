"""A training file that forgets to call serve."""


def train(params, context):
    return None
