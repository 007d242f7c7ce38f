"""What came back: answers read, logged, turned into a product."""
