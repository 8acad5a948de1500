"""Why an image cannot be pushed, or is not what it should be."""


class ImageError(Exception):
    """The message is one line and says what to do."""
