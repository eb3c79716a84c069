// Package hbm is the client of the HMM, the daemon that owns a node's device memory: objects, holds, maps and claims.
// A process has one Client. The package keeps no memory alive by itself and moves no bytes but what is attached from another
// memory domain; what it maps is gone when the connection is (Lost), although the addresses stay readable until Close.
package hbm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// Hello introduces an instance to the HMM.
type Hello struct {
	Instance string // instance id
	Role     string // gateway, encode, prefill, decode, or several of the last three joined by +; the gateway gets host memory only
	NPUs     int    // NPUs wanted; 0 for the gateway
	Name     string // stable name, which an instance that is started in the place of this one has, too; "": none
	Want     []int  // NPUs wanted, by number, and no others; nil: those reserved for Name, then the lowest spare ones
}

// Ref names a request hold: the HMM keeps the object until the request ends, a newer attempt at it appears, or its
// deadline, Left from now, is 10 s past.
type Ref = protocol.Ref

// Stats is the state of the node's memory.
type Stats = protocol.Stats

// NPUStats is the part of Stats about one NPU.
type NPUStats = protocol.NPUStats

// WeightsStats is the part of Stats about one weight set.
type WeightsStats = protocol.WeightsStats

// Usage is memory in use.
type Usage = protocol.Usage

// ErrVersion is returned by Dial when the HMM speaks another version of the protocol.
var ErrVersion = protocol.ErrVersion

// Client is a connection to the HMM with the maps made over it. Its methods may be called from many goroutines.
type Client struct {
	conn  *net.UnixConn
	node  string
	homes []int                      // of each NPU of the node: its space; none for the gateway
	table atomic.Pointer[host.View]  // of claims; nil once the connection has ended
	board atomic.Pointer[host.Board] // what this client says of its work, by slot of the claim; nil for the gateway, and as table
	maps  maps

	writing sync.Mutex // one write at a time

	mu      sync.Mutex
	npus    []int
	out     []byte // requests that are not written yet, whole frames
	lastID  uint64
	pending map[uint64]chan reply
	cause   error // why the connection ended; nil while it lives

	lost       chan struct{}
	background sync.WaitGroup // the reader, and calls given up that may still bring something to free
	closing    sync.Once
	closeErr   error
}

type reply struct {
	body    []byte
	failure error
}

// retryDial is the pause between two tries to reach a socket that is not there yet.
const retryDial = 20 * time.Millisecond

// maxWrite bounds the time to hand a request to the HMM, which always reads; beyond it the connection is given up.
const maxWrite = 30 * time.Second

// Dial connects to the HMM at a Unix socket. It waits until ctx ends while the socket is not there or nobody listens.
// ErrExhausted when the NPUs wanted are not to be had, ErrDenied when another instance has the name, ErrVersion when the HMM is of
// another version.
func Dial(ctx context.Context, socket string, h Hello) (*Client, error) {
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			c, err := handshake(ctx, conn.(*net.UnixConn), h)
			if err != nil {
				return nil, errors.Join(fmt.Errorf("connecting %s to the HMM at %s: %w", h.Instance, socket, err), conn.Close())
			}
			c.background.Add(1)
			go c.read()
			return c, nil
		}
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EAGAIN) {
			return nil, fmt.Errorf("connecting to the HMM: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connecting to the HMM: %w: %w", ctx.Err(), err)
		case <-time.After(retryDial):
		}
	}
}

func handshake(ctx context.Context, conn *net.UnixConn, h Hello) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	hello, err := protocol.Request(1, protocol.OpHello, protocol.Hello{
		Version: protocol.Version, Instance: h.Instance, Role: h.Role, NPUs: h.NPUs, Name: h.Name, Want: h.Want,
	})
	if err != nil {
		return nil, err
	}
	_, writeErr := conn.Write(hello)
	// An HMM that refuses may have answered and closed before it read the hello: what it says is better than writeErr.
	payload, files, err := receive(conn)
	if err != nil {
		return nil, errors.Join(ctx.Err(), writeErr, err)
	}
	c, err := welcome(conn, payload, files)
	if err != nil {
		for _, f := range files { // those taken over are closed already, which is no harm
			_ = f.Close()
		}
		return nil, err
	}
	if !stop() {
		return nil, errors.Join(ctx.Err(), c.maps.close())
	}
	return c, nil
}

// maxFiles is the most descriptors that come with a welcome: as many as a message can carry (SCM_MAX_FD).
const maxFiles = 253

// receive reads the first frame and the descriptors that come with its first bytes.
func receive(conn *net.UnixConn) (payload []byte, files []*os.File, err error) {
	var first [1]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, _, _, err := conn.ReadMsgUnix(first[:], oob)
	if err != nil {
		return nil, nil, fmt.Errorf("receiving the welcome: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, nil, fmt.Errorf("receiving descriptors: %w", err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // no descriptors
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), fmt.Sprintf("memory %d of the HMM", len(files))))
		}
	}
	payload, err = protocol.ReadFrame(&prefixed{first[:n], conn})
	if err != nil {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, nil, fmt.Errorf("receiving the welcome: %w", err)
	}
	return payload, files, nil
}

// prefixed reads some bytes already taken from a connection, then the connection.
type prefixed struct {
	taken []byte
	conn  *net.UnixConn
}

// Read implements io.Reader.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.taken) > 0 {
		n := copy(b, p.taken)
		p.taken = p.taken[n:]
		return n, nil
	}
	return p.conn.Read(b)
}

// welcome makes a client of the HMM's first answer. The files are taken over one by one.
func welcome(conn *net.UnixConn, payload []byte, files []*os.File) (*Client, error) {
	_, body, failure, err := protocol.ParseReply(payload)
	if err = errors.Join(failure, err); err != nil {
		return nil, err
	}
	var w protocol.Welcome
	if err := protocol.Decode(body, &w); err != nil {
		return nil, err
	}
	if w.Version != protocol.Version {
		return nil, fmt.Errorf("the HMM speaks version %d, this program %d: %w", w.Version, protocol.Version, ErrVersion)
	}
	boards := 0
	if w.Board {
		boards = 1
	}
	if len(files) != 1+len(w.Spaces)+boards {
		return nil, fmt.Errorf("%d descriptors came for %d spaces, the claim table and %d boards: %w", len(files), len(w.Spaces), boards,
			mem.ErrInvalid)
	}
	c := &Client{conn: conn, node: w.Node, npus: w.NPUs, homes: w.Domains, pending: map[uint64]chan reply{}, lost: make(chan struct{}), lastID: 1}
	c.maps.live = map[place]*mapping{}
	table, err := host.OpenView(files[0], w.Slots)
	if err != nil {
		return nil, err
	}
	c.table.Store(table)
	for i, s := range w.Spaces {
		space, err := host.OpenSpace(files[1+i], s.Bytes)
		if err != nil {
			return nil, errors.Join(err, c.maps.close())
		}
		c.maps.spaces = append(c.maps.spaces, space)
	}
	if w.Board {
		board, err := host.OpenBoard(files[1+len(w.Spaces)], w.Slots)
		if err != nil {
			return nil, errors.Join(err, c.maps.close())
		}
		c.board.Store(board)
	}
	return c, nil
}

// Node is the id of the node.
func (c *Client) Node() string { return c.node }

// Lost is closed when the connection has ended, by Close too. Every map is then useless: the HMM may give its memory to
// others once this process ends. Calls return mem.ErrLost from then on.
func (c *Client) Lost() <-chan struct{} { return c.lost }

// Close unmaps everything and ends the connection: the HMM drops this connection's holds and NPUs, and its claims become
// orphans. Memory of any Object must not be in use any more. When Close returns, the HMM has done so, unless the
// connection was lost before.
func (c *Client) Close() error {
	c.closing.Do(func() {
		err := c.maps.close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if bye := c.call(ctx, protocol.OpBye, nil, nil); bye != nil && !errors.Is(bye, mem.ErrLost) {
			err = errors.Join(err, fmt.Errorf("taking leave of the HMM: %w", bye))
		}
		c.end(errors.New("closed"))
		c.background.Wait()
		c.closeErr = err
	})
	return c.closeErr
}

// end notes why the connection is over, once, and wakes everyone who waits for an answer.
func (c *Client) end(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return
	}
	c.cause = cause
	c.table.Store(nil) // the collector unmaps it after the last Held that still looks at it
	c.board.Store(nil)
	close(c.lost)
	_ = c.conn.Close() // it has ended already or has nothing left to say
}

func (c *Client) lostError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Errorf("%w: %w", mem.ErrLost, c.cause)
}

// read hands out the answers until the connection ends.
func (c *Client) read() {
	defer c.background.Done()
	r := bufio.NewReaderSize(c.conn, 64<<10)
	for {
		payload, err := protocol.ReadFrame(r)
		if err != nil {
			c.end(err)
			return
		}
		id, body, failure, err := protocol.ParseReply(payload)
		if err == nil && id == 0 { // the HMM's last word to this connection
			err = failure
		}
		if err != nil {
			c.end(err)
			return
		}
		c.mu.Lock()
		answer := c.pending[id]
		delete(c.pending, id)
		c.mu.Unlock()
		if answer != nil {
			answer <- reply{body, failure}
		}
	}
}

// send hands a request to the HMM; the answer comes on the channel, unless the connection ends first.
func (c *Client) send(op protocol.Op, body any) (<-chan reply, error) {
	answer := make(chan reply, 1)
	c.mu.Lock()
	if c.cause != nil {
		c.mu.Unlock()
		return nil, c.lostError()
	}
	c.lastID++
	id := c.lastID
	c.pending[id] = answer
	c.mu.Unlock()
	frame, err := protocol.Request(id, op, body)
	if err != nil {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
		return nil, err
	}
	c.mu.Lock()
	c.out = append(c.out, frame...)
	c.mu.Unlock()
	if err := c.flush(); err != nil {
		c.end(err)
		return nil, c.lostError()
	}
	return answer, nil
}

// flush writes the requests that wait, its caller's among them, unless another caller's flush has done so: many callers
// at once share writes. Who was served by one that failed learns it from the end of the connection.
func (c *Client) flush() error {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.mu.Lock()
	out := c.out
	c.out = nil
	c.mu.Unlock()
	if len(out) == 0 {
		return nil
	}
	if err := c.conn.SetWriteDeadline(time.Now().Add(maxWrite)); err != nil {
		return err
	}
	_, err := c.conn.Write(out)
	return err
}

// call sends a request and waits for its answer, which it decodes into out unless that is nil.
func (c *Client) call(ctx context.Context, op protocol.Op, body, out any) error {
	return c.acquire(ctx, op, body, out, nil)
}

// acquire is call for requests that give the client something. When ctx ends first, the answer is awaited in the
// background, and undo is called after one that gave it.
func (c *Client) acquire(ctx context.Context, op protocol.Op, body, out any, undo func()) error {
	answer, err := c.send(op, body)
	if err != nil {
		return err
	}
	select {
	case r := <-answer:
		return r.into(out)
	case <-c.lost:
		select {
		case r := <-answer: // it came just before the end
			return r.into(out)
		default:
			return c.lostError()
		}
	case <-ctx.Done():
	}
	if undo != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.cause == nil { // so nobody waits for the background yet
			c.background.Add(1)
			go func() {
				defer c.background.Done()
				select {
				case r := <-answer:
					if r.into(out) == nil {
						undo()
					}
				case <-c.lost:
				}
			}()
		}
	}
	return fmt.Errorf("waiting for the HMM: %w", ctx.Err())
}

func (r reply) into(out any) error {
	if r.failure != nil || out == nil {
		return r.failure
	}
	return protocol.Decode(r.body, out)
}

// Stats asks for the state of the node's memory.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	err := c.call(ctx, protocol.OpStats, nil, &s)
	return s, err
}

// End tells the HMM that a request is finished or cancelled: its holds end, its claims are void, and later allocations
// and claims for it are refused with mem.ErrEnded.
func (c *Client) End(ctx context.Context, request string) error {
	return c.call(ctx, protocol.OpEnd, request, nil)
}
