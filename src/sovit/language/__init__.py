"""Images with texts: pairs, vocabulary, text tower, contrastive losses, multitask decoder, and what scores them."""
