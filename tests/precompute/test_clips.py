from .media import video_bytes
def test_a(): pass
