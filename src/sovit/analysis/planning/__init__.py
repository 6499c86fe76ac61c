"""What a sweep will tell before it is run, and which one tells most: `sovit plan --noise`, `design`, `next`."""
