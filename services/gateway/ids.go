package gateway

import "crypto/rand"

// newID makes the id of a request: 22 letters and digits, 131 random bits. It is a token of NATS subjects, of keys and
// of message ids.
func newID() string {
	const letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	const fair = 256 / len(letters) * len(letters) // bytes below it give every letter the same chance
	id := make([]byte, 0, 22)
	var random [32]byte
	for len(id) < cap(id) {
		_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the program instead
		for _, b := range random {
			if int(b) < fair && len(id) < cap(id) {
				id = append(id, letters[int(b)%len(letters)])
			}
		}
	}
	return string(id)
}
