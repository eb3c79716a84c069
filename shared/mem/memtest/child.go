package memtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// childEnv marks a test binary started as another process of a test.
const childEnv = "TRIREME_MEMTEST_CHILD"

// childSocket is the descriptor at which a child finds its socket.
const childSocket = 3

// IsChild reports whether this process was started by the suite, to be its other process.
func IsChild() bool { return os.Getenv(childEnv) != "" }

// Main is for TestMain of a package that calls Run: it runs the tests, or in a child what the suite asks for, and returns
// the exit status. Descriptors that the backend keeps open for good must be open before.
func Main(m *testing.M, b Backend) int {
	if !IsChild() {
		return m.Run()
	}
	if err := serve(b.filled()); err != nil {
		fmt.Fprintln(os.Stderr, "memtest child:", err)
		return 1
	}
	return 0
}

// command is what the test asks of a child, one a packet. A descriptor may come with it.
type command struct {
	Op     string
	Extent mem.Extent
	Access mem.Access
	Bytes  int64  // of the space: open
	Seed   uint64 // of the noise: fill
	At     uint64 // where to read what is not mapped: sum
}

// answer is the child's answer to a command.
type answer struct {
	Err     string   // "" when it worked
	Invalid bool     // Err wraps mem.ErrInvalid
	At      uint64   // address: map
	CRC     uint32   // of the extent: sum
	Zero    bool     // the extent is: sum
	Left    []string // what was left behind: close
}

// child is the state of a child: one space.
type child struct {
	Backend
	before map[string]int // descriptors and maps at its start
	space  mem.Space
	at     map[mem.Extent]uintptr // where extents were mapped, also when they are no more
}

func serve(b Backend) error {
	conn, err := packets(os.NewFile(childSocket, "socket"))
	if err != nil {
		return err
	}
	c := &child{Backend: b, at: map[mem.Extent]uintptr{}}
	if c.before, err = held(); err != nil {
		return err
	}
	for {
		var cmd command
		f, err := receive(conn, &cmd)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var a answer
		if err := c.do(cmd, f, &a); err != nil {
			a.Err, a.Invalid = err.Error(), errors.Is(err, mem.ErrInvalid)
		}
		if err := send(conn, a, nil); err != nil {
			return err
		}
	}
}

func (c *child) do(cmd command, f *os.File, a *answer) (err error) {
	e := cmd.Extent
	switch cmd.Op {
	case "open":
		c.space, err = c.Open(f, cmd.Bytes)
	case "import":
		err = c.space.(mem.Importer).Import(e, f)
	case "forget":
		err = c.space.(mem.Importer).Forget(e)
	case "map":
		c.at[e], err = c.space.Map(e, cmd.Access)
		a.At = uint64(c.at[e])
	case "protect":
		err = c.space.Protect(e, cmd.Access)
	case "unmap":
		err = c.space.Unmap(e)
	case "fill":
		err = c.Poke(c.at[e], noise(cmd.Seed, e.Bytes))
	case "sum":
		p, at := make([]byte, e.Bytes), c.at[e]
		if cmd.At != 0 {
			at = uintptr(cmd.At)
		}
		err = c.Peek(p, at)
		a.CRC, a.Zero = mem.Checksum(p), allZero(p)
	case "close":
		if err = c.space.Close(); err != nil {
			return err
		}
		var now map[string]int
		now, err = held()
		a.Left = added(c.before, now)
	default:
		err = fmt.Errorf("unknown command %q", cmd.Op)
	}
	return err
}

// packets makes a connection of one end of a SOCK_SEQPACKET pair; it takes f over.
func packets(f *os.File) (*net.UnixConn, error) {
	conn, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

func send(conn *net.UnixConn, v any, f *os.File) error {
	p, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var oob []byte
	if f != nil {
		oob = unix.UnixRights(int(f.Fd()))
	}
	_, _, err = conn.WriteMsgUnix(p, oob, nil)
	return err
}

// receive reads a packet into v, and the descriptor that came with it, if any. io.EOF when the other side is gone.
func receive(conn *net.UnixConn, v any) (*os.File, error) {
	p, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(p, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	var f *os.File
	if oobn > 0 {
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return nil, err
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			return nil, err
		}
		unix.CloseOnExec(fds[0])
		f = os.NewFile(uintptr(fds[0]), "received")
	}
	d := json.NewDecoder(strings.NewReader(string(p[:n])))
	return f, d.Decode(v)
}
