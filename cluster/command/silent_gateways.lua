-- Ends the requests in gateways that are silent: `lua-load silent_gateways.lua SECONDS` in HAProxy's configuration.
--
-- HAProxy's own checks decide which gateways get new requests. A gateway that gets no CPU time for some seconds fails
-- them, but its requests must go on. HAProxy also stops them in a process that a new one has replaced. The checks here
-- run in such a process too, while a gateway has requests. Clients send the requests that they end to another gateway.

local CHECKS = 3 -- without an answer, one after the other. A pause of HAProxy itself fails one of them only
local REQUEST = "GET /-/healthz HTTP/1.0\r\n\r\n"
local PAUSE_S = 1 -- between two checks
local timeout_s = math.max(1, tonumber((...)) // CHECKS - PAUSE_S)

-- Any answer will do: a gateway that drains answers 503, and later refuses connections. HAProxy tries a refused connection
-- again for 3 s, and waits up to 5 s for one that nobody answers.
local REFUSED_S = 4

local function answers(server)
    local began_s = core.now().sec
    local socket = core.tcp()
    socket:settimeout(timeout_s)
    local answered
    if socket:connect(server:get_addr()) then
        answered = socket:send(REQUEST) and socket:receive("*l") ~= nil
    else
        answered = core.now().sec - began_s <= REFUSED_S
    end
    socket:close()
    return answered
end

local function watch(name, server)
    local failed = 0
    while true do
        core.sleep(PAUSE_S)
        if server:get_stats().scur == 0 or answers(server) then
            failed = 0
        else
            failed = failed + 1
        end
        if failed == CHECKS then
            core.Warning(name .. " is silent: its requests end")
            server:shut_sess()
            failed = 0
        end
    end
end

core.register_init(function()
    for backend_name, backend in pairs(core.backends) do
        if backend_name:find("^http%-") then
            for name, server in pairs(backend.servers) do
                core.register_task(watch, name, server)
            end
        end
    end
end)
