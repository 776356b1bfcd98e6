//! The guest's callbacks, looked up once per instance.

use wasmtime::{Instance as WasmInstance, Store};

use super::super::{Event, Flow, View, Which};
use super::entry::{Answer, Callback, Params};
use super::host::{Host, Phase};
use super::{headers, trace};

type Ids = (u32, u32);

/// Headers callbacks by the type that the module exports: ABI 0.1.0, and some modules that only say so, know no `end_of_stream`.
pub(super) enum OnHeaders {
    Short(Callback<Ids, u32>),
    Long(Callback<(u32, u32, u32), u32>),
}

impl OnHeaders {
    fn call(&self, store: &mut Store<Host>, context: u32, count: u32, end: bool) -> wasmtime::Result<u32> {
        match self {
            Self::Short(function) => function.call(store, (context, count)),
            Self::Long(function) => function.call(store, (context, count, u32::from(end))),
        }
    }
}

type OnBody = Callback<(u32, u32, u32), u32>;

/// What comes to a stream context in one direction.
#[derive(Default)]
pub(super) struct Direction {
    pub(super) headers: Option<OnHeaders>,
    pub(super) body: Option<OnBody>,
    pub(super) trailers: Option<Callback<Ids, u32>>,
    /// TCP: bytes
    pub(super) data: Option<OnBody>,
    /// TCP: the sending side is gone
    pub(super) closed: Option<Callback<Ids>>,
}

/// All of them; `None`: the module does not export it.
pub(super) struct Callbacks {
    pub(super) create: Option<Callback<Ids>>,
    pub(super) vm_start: Option<Callback<Ids, u32>>,
    pub(super) configure: Option<Callback<Ids, u32>>,
    pub(super) connection: Option<Callback<u32, u32>>,
    pub(super) request: Direction,
    pub(super) response: Direction,
    pub(super) done: Option<Callback<u32, u32>>,
    pub(super) log: Option<Callback<u32>>,
    pub(super) delete: Option<Callback<u32>>,
    pub(super) root: RootCallbacks,
}

/// Callbacks of root contexts, but their start and end.
pub(super) struct RootCallbacks {
    pub(super) tick: Option<Callback<u32>>,
    pub(super) queue_ready: Option<Callback<Ids>>,
    pub(super) http_answer: Option<OnAnswer>,
    pub(super) grpc_initial: Option<OnGrpc>,
    pub(super) grpc_message: Option<OnGrpc>,
    pub(super) grpc_trailing: Option<OnGrpc>,
    pub(super) grpc_close: Option<OnGrpc>,
}

type OnGrpc = Callback<(u32, u32, u32)>;
type OnAnswer = Callback<(u32, u32, u32, u32, u32)>;

fn find<P: Params, R: Answer>(
    store: &mut Store<Host>,
    instance: &WasmInstance,
    name: &str,
) -> wasmtime::Result<Option<Callback<P, R>>> {
    let Some(mut function) = instance.get_func(&mut *store, name) else { return Ok(None) };
    if store.data().spec.trace {
        function = trace::callback(store, name, function);
    }
    Callback::new(store, function).map(Some)
}

impl Callbacks {
    /// Looks them up; their types have been checked when the module was loaded.
    pub(super) fn of(store: &mut Store<Host>, instance: &WasmInstance) -> wasmtime::Result<Self> {
        let headers = |store: &mut Store<Host>, name: &str| -> wasmtime::Result<Option<OnHeaders>> {
            if let Ok(long) = find(&mut *store, instance, name) {
                return Ok(long.map(OnHeaders::Long));
            }
            Ok(find(store, instance, name)?.map(OnHeaders::Short))
        };
        Ok(Self {
            create: find(store, instance, "proxy_on_context_create")?,
            vm_start: find(store, instance, "proxy_on_vm_start")?,
            configure: find(store, instance, "proxy_on_configure")?,
            connection: find(store, instance, "proxy_on_new_connection")?,
            request: Direction {
                headers: headers(store, "proxy_on_request_headers")?,
                body: find(store, instance, "proxy_on_request_body")?,
                trailers: find(store, instance, "proxy_on_request_trailers")?,
                data: find(store, instance, "proxy_on_downstream_data")?,
                closed: find(store, instance, "proxy_on_downstream_connection_close")?,
            },
            response: Direction {
                headers: headers(store, "proxy_on_response_headers")?,
                body: find(store, instance, "proxy_on_response_body")?,
                trailers: find(store, instance, "proxy_on_response_trailers")?,
                data: find(store, instance, "proxy_on_upstream_data")?,
                closed: find(store, instance, "proxy_on_upstream_connection_close")?,
            },
            done: find(store, instance, "proxy_on_done")?,
            log: find(store, instance, "proxy_on_log")?,
            delete: find(store, instance, "proxy_on_delete")?,
            root: RootCallbacks {
                tick: find(store, instance, "proxy_on_tick")?,
                queue_ready: find(store, instance, "proxy_on_queue_ready")?,
                http_answer: find(store, instance, "proxy_on_http_call_response")?,
                grpc_initial: find(store, instance, "proxy_on_grpc_receive_initial_metadata")?,
                grpc_message: find(store, instance, "proxy_on_grpc_receive")?,
                grpc_trailing: find(store, instance, "proxy_on_grpc_receive_trailing_metadata")?,
                grpc_close: find(store, instance, "proxy_on_grpc_close")?,
            },
        })
    }

    fn direction(&self, flow: Flow) -> &Direction {
        match flow {
            Flow::Request => &self.request,
            Flow::Response => &self.response,
        }
    }

    /// Calls the guest's callback for this, if there is one; what it returned (0: continue).
    pub(super) fn call(
        &self,
        store: &mut Store<Host>,
        (context, root): (u32, usize),
        flow: Flow,
        event: Event,
        view: &View,
    ) -> wasmtime::Result<u32> {
        let (direction, tcp) = (self.direction(flow), view.is_tcp());
        let count = |which| view.read(flow, which, headers::count_of).unwrap_or_default();
        let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let begin = |store: &mut Store<Host>| store.data_mut().callback(context, root, Phase::Stream);
        match event {
            Event::Headers { .. } if tcp => {
                let Some(callback) = &self.connection else { return Ok(0) };
                begin(store);
                callback.call(store, context)
            }
            Event::Headers { end } => {
                let Some(callback) = &direction.headers else { return Ok(0) };
                begin(store);
                callback.call(store, context, word(count(Which::Headers)), end)
            }
            Event::Body { size, end } => {
                let callback = if tcp { &direction.data } else { &direction.body };
                let Some(callback) = callback else { return Ok(0) };
                begin(store);
                callback.call(store, (context, word(size), u32::from(end)))
            }
            Event::Trailers => {
                let Some(callback) = &direction.trailers else { return Ok(0) };
                begin(store);
                callback.call(store, (context, word(count(Which::Trailers))))
            }
            Event::Closed(peer) => {
                let Some(callback) = &direction.closed else { return Ok(0) };
                begin(store);
                callback.call(store, (context, peer as u32)).map(|()| 0)
            }
        }
    }
}
