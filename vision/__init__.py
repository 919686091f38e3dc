"""Images as input.

images          png and jpeg files to pixels of one size
encoder         patches of an image to vectors in the place of tokens' embeddings
"""
