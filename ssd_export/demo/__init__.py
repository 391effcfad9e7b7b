"""The small trained model: scenes, captions, checker, recipe."""
