package transfer

// What tests of the server send by hand.
var (
	Hello             = string(helloFrame())
	OversizedRequest  = string(rawHead(head{kind: kindRequest, bytes: maxSpan + 1, size: 60}))
	RequestOfNoHandle = string(withTail(head{kind: kindRequest, bytes: 5}, []byte("\xffthis is no handle")))
)

// HelloOf is the hello of another version.
func HelloOf(version uint64) string {
	return string(rawHead(head{kind: kindHello, bytes: magic, offset: version}))
}

func rawHead(h head) []byte {
	var p [headBytes]byte
	h.put(&p)
	return p[:]
}
