package imageprep

import (
	"crypto/sha256"
	"fmt"
)

// Digest names the processor by its numbers: two with the same digest make the same patches of the same picture.
func (c Config) Digest() [32]byte { return sha256.Sum256(fmt.Appendf(nil, "imageprep 1 %+v", c)) }
